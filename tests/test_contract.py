"""Each YAML of conf/variant keeps the contracts of its kind, tests/contract.py."""

import contract
import pytest
import torch
from contract import CONF, composed
from torch import nn

import variants
from variants.lora import LoraLinear

NAMES = sorted(file.stem for file in (CONF / "variant").glob("*.yaml"))
LOW_RANK = [
    name for name in NAMES
    if issubclass(composed(CONF, name).adapter.func, variants.LowRankLinear)
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
class TestEveryVariant(contract.Adapters):
    pass


@pytest.mark.parametrize("name", LOW_RANK)
class TestLowRankVariants(contract.LowRank):
    pass


@pytest.mark.parametrize("name", NAMES)
class TestStarts(contract.Starts):
    pass


@pytest.mark.parametrize("name", LOW_RANK)
class TestDrawnStarts(contract.DrawnStarts):
    pass


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.mul_(2),
        lambda weight: nn.init.normal_(weight),
        lambda weight: weight.__setitem__(0, 0.0),
        lambda weight: setattr(weight, "data", torch.zeros(16, 33)),
    ],
)
def test_a_write_to_the_weight_is_refused(write):
    layer = contract.Contract().layer_of("lora")
    with torch.no_grad(), pytest.raises(ValueError, match="writes the weight of query in place"):
        write(layer.weight)


def test_all_variants_built_on_one_layer_start_from_the_same_A():
    starts = {}
    for name in NAMES:
        layer = contract.Contract().layer_of(name, disturbed=False)
        if isinstance(layer, LoraLinear):
            starts[name] = layer.A.detach()
    assert len(starts) >= 5
    first = next(iter(starts.values()))
    assert all(torch.equal(A, first) for A in starts.values())


def test_layers_hear_of_a_step_before_the_allocator():
    calls = []

    class Layer:
        def after_step(self, step):
            calls.append(("layer", step))

    class Allocator:
        def after_step(self, layers, optimizer, step):
            calls.append(("allocator", step))
            return {"rank/mean": 1.0}

    layers = {"a": Layer(), "b": Layer()}
    assert variants.after_step(layers, None, 5) == {}
    assert variants.after_step(layers, None, 6, Allocator()) == {"rank/mean": 1.0}
    assert calls == [("layer", 5)] * 2 + [("layer", 6)] * 2 + [("allocator", 6)]
