"""A GPU's dress rehearsal without a GPU: the whole step on a device that is not the CPU.

FakeTensorMode runs everything without values, and raises where two devices meet. The device `meta`
stands for the accelerator: what asks for `device.type == "cpu"` takes a GPU's way.
"""

import contextlib
import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from adapters import config_of
from test_sites import H, Routed
from torch import nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import variants.dropout
from harness.config import build
from harness.loop import meter
from harness.loop.step import training_step
from harness.tasks.batch import Batch
from variants import DenseStore, Int8Store, Nf4Store

CARD = torch.device("meta")
aten = torch.ops.aten
# Operations whose result the host waits for, if it is of a device.
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.unique_dim.default, aten.equal.default, aten.bincount.default,
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes where the host waits for the card, and answers with numbers that go on."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, first = kwargs or {}, next((a for a in args if isinstance(a, torch.Tensor)), None)
        there = first is not None and first.device == CARD
        to_host = func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        by_mask = func is aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool and i.device == CARD for i in args[1]
        )
        if there and (func in WAITING or to_host or by_mask):
            self.seen.append(str(func))
        if func is aten._local_scalar_dense.default:
            return 1.0 if first.is_floating_point() else first.dtype == torch.bool or 1
        return func(*args, **kwargs)

    def listed(self, tensor):
        """`tolist`, which waits once and reads memory below the dispatcher."""
        if tensor.device == CARD:
            self.seen.append("tolist")
        one = 1.0 if tensor.is_floating_point() else 1
        return [one] * tensor.numel() if tensor.ndim else one


class Torch:
    """torch, whose streams are on the card alone."""

    def __getattr__(self, name):
        return getattr(torch, name)

    class Generator:
        def __init__(self, device):
            assert torch.device(device) == CARD, "drawn on the host"

        def manual_seed(self, seed):
            return None


@pytest.fixture
def card(monkeypatch):
    """A card without values, and a record of the waits for it."""
    waits = Waits()
    monkeypatch.setattr(FakeTensor, "is_meta", property(lambda self: False), raising=False)
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: waits.listed(tensor))
    monkeypatch.setattr(variants.dropout, "torch", Torch())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield SimpleNamespace(mode=mode, waits=waits)


def moved(model: nn.Module) -> None:
    """Put a model onto the card."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                there = parameter.detach().to(CARD)
                made.setdefault(id(parameter), nn.Parameter(there, parameter.requires_grad))
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(CARD)


def step_of(card, model, layers, method, loss, batch, **given):
    """`training_step` on the card, with the loop's optimiser and allocator."""
    moved(model)
    groups = method.groups(model, lr=0.1)
    for group in groups:
        group["initial_lr"] = group["lr"]
    allocator = method.allocator and method.allocator(layers, total_steps=4, seed=0)
    take_step = partial(
        training_step, model=model.train(), layers=layers, variant=method, loss=loss, device=CARD,
        optimizer=torch.optim.AdamW(groups), allocator=allocator, seed=0, rate_factor=1.0,
        clip_norm=1.0, **given,
    )  # fmt: skip

    def step(number):
        card.waits.seen.clear()
        with card.waits:
            done = take_step(number, batches=iter([batch]))
        return done, list(card.waits.seen)

    return step, allocator


def under_test(variant, store, *overrides):
    """A tiny BERT with a variant over a store, on the CPU, with values."""
    one_block = "model.sizes={num_hidden_layers: 1}"
    config = config_of(f"variant={variant}", one_block, *overrides)
    base, method = build.load_base(config, ["a", "b"]), build.make_variant(config)
    if store is not DenseStore:
        method = dataclasses.replace(method, store=store)
    return base.model, method, build.adapt(base, method, config)


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(**batch.inputs).logits, batch.labels)


BATCH = Batch(
    {name: torch.ones(3, 9, dtype=torch.long) for name in ("input_ids", "attention_mask")},
    torch.ones(3, dtype=torch.long), (0, 1, 2), 27,
)  # fmt: skip
FACTORS = ["lora", "dora", "adalora", "adalora_budget"]
PAIRS = [
    *((variant, DenseStore) for variant in FACTORS),
    *((variant, Nf4Store) for variant in ("lora", "dora")),
    *(
        pytest.param(variant, store, marks=pytest.mark.long)
        for variant in FACTORS
        for store in (Nf4Store, Int8Store)
        if store is Int8Store or variant.startswith("adalora")
    ),
    *((variant, DenseStore) for variant in ("lora_plus", "full", "bitfit", "head")),
]


@pytest.mark.parametrize(("variant", "store"), PAIRS)
def test_a_step_stays_on_its_card_and_waits_for_it_once(request, variant, store):
    """Twice where an allocator decides ranks; then evaluation, merged too, and the row of a log."""
    low_rank = variant in (*FACTORS, "lora_plus")
    dtype = "float16" if store is Nf4Store else "bfloat16" if low_rank else "float32"
    cuts = ["variant.allocator.interval=1"] if variant.startswith("adalora") else []
    dropout = ["dropout=0.1"] if low_rank else []
    model, method, layers = under_test(
        variant, store, *cuts, *dropout, f"train.compute_dtype={dtype}"
    )
    norms = build.base_norms(layers)
    before = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
    card = request.getfixturevalue("card")
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == "float16")
    step, allocator = step_of(card, model, layers, method, loss_of, BATCH, scaler=scaler)
    decided = 0
    for number in range(1, 4):
        _, waits = step(number)
        if allocator is not None and allocator.is_due(number):
            decided += 1
            assert variant == "adalora" or len(waits) <= 2  # it takes its factors to the host
        else:
            assert waits == ["tolist"]
    assert decided == (2 if variant.startswith("adalora") else 0)
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == before
    assert {p.device for p in model.parameters()} == {CARD}
    card.waits.seen.clear()
    with card.waits:
        meter.factor_norms(layers, norms)
    assert card.waits.seen == ["tolist"] * low_rank
    model.eval()
    with torch.no_grad(), card.waits:
        for layer in (None, *layers.values()):
            if layer is not None:
                layer.merge()
        logits = model(**BATCH.to(CARD).inputs).logits
    assert logits.device == CARD and logits.dtype == torch.float32


def test_the_rehearsal_notices_the_host(card):
    """Names its reason: another device, a number asked for, a mask, a copy, a draw on the host."""
    x = torch.ones(3, device=CARD)
    with card.waits:
        for wait in (
            lambda: float(x.sum()), lambda: x.tolist(), lambda: x.cpu(),
            lambda: bool((x > 0).any()), lambda: x[x > 0], lambda: x.nonzero(),
        ):  # fmt: skip
            card.waits.seen.clear()
            with contextlib.suppress(DynamicOutputShapeException):
                wait()
            assert len(card.waits.seen) == 1
        with pytest.raises(RuntimeError, match="found at least two devices"):
            x + torch.ones(3)
        with pytest.raises(AssertionError, match="drawn on the host"):
            variants.dropout.torch.Generator("cpu")


def test_a_batch_is_copied_while_the_host_goes_on(monkeypatch):
    """Pinned first, or the copy to a GPU would be waited for."""
    pinned, copies = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, d, **given: copies.append((d, given)) or t)
    batch = Batch({"input_ids": torch.ones(2, 3)}, torch.ones(2), (0, 1), 6)
    for device, count in (("cpu", 0), (torch.device("cuda:1"), 2)):
        copies.clear()
        batch.to(device)
        assert len(pinned) == count and copies == [(device, {"non_blocking": True})] * 2


class Kinds(nn.Module):
    """An embedding, a kernel, nn.MultiheadAttention, experts and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(20, H), nn.Conv1d(H, H, 3, padding=1)
        self.attention = nn.MultiheadAttention(H, 2, batch_first=True)
        self.routed, self.out = Routed(MixtralExperts, "batched_mm"), nn.Linear(H, 2)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, input_ids):
        x = self.conv(self.embed(input_ids).mT).mT
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.out(self.routed(x.flatten(0, 1)))[:3]


@pytest.mark.parametrize("variant", FACTORS)
def test_every_kind_of_site_stays_on_the_card(request, variant):
    """transformers' other ways with experts are no business of the rehearsal: `eager` itself asks
    the card which are used, and `grouped_mm` counts by an operation without a stand-in."""
    cuts = ["variant.allocator.interval=1"] if variant.startswith("adalora") else []
    method, model = build.make_variant(config_of(f"variant={variant}", "rank=2", *cuts)), Kinds()
    names = ["embed", "conv", "in_proj_weight", "out_proj", "experts", "out"]
    layers = variants.inject(model, method, seed=0, targets=names, compute_dtype=torch.bfloat16)
    assert len(layers) == 5 + 2 * 3
    card = request.getfixturevalue("card")

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch.inputs["input_ids"]), batch.labels)

    step, allocator = step_of(card, model, layers, method, loss, BATCH)
    for number in range(1, 4):
        _, waits = step(number)
        if allocator is None or not allocator.is_due(number):
            assert waits == ["tolist"]
