"""The 8-bit store against bitsandbytes (bit for bit) and numpy in float64."""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from test_nf4 import DTYPES, SHAPES, weight_of

from variants import DenseStore, Int8Store, LoraLinear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_values_are_those_of_bitsandbytes(shape, dtype):
    weight = weight_of(shape, dtype)
    store = Int8Store(weight)
    theirs, absmax, _ = bnb.int8_vectorwise_quant(weight.clone())
    some = weight.abs().amax(1) > 0  # of a row of zeros theirs is whatever a NaN becomes
    assert torch.equal(store.codes[some], theirs[some]) and not store.codes[~some].any()
    assert torch.equal(store.absmax.view(torch.float32), absmax)
    values = bnb.int8_vectorwise_dequant(store.codes, absmax)
    assert torch.equal(store.dequantize(torch.float32), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_value_is_off_by_half_a_step_at_most(shape, dtype):
    weight = weight_of(shape, dtype)
    W = weight.double().numpy()
    found = Int8Store(weight).dequantize(torch.float32).double().numpy()
    step = np.abs(W).max(1, keepdims=True) / 127
    assert np.all(np.abs(found - W) <= step * (0.5 + 1e-4))


def test_bits_a_cast_and_a_device_without_values():
    weight = weight_of((48, 64))
    store = Int8Store(weight)
    assert store.nbytes() == 48 * 64 + 4 * 48
    before = store.dequantize(torch.float32)
    assert torch.equal(store.half().dequantize(torch.float32), before)
    assert store.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert Int8Store(weight.to("meta")).dequantize(torch.float32).shape == (48, 64)
    again = Int8Store(weight.half()).like(weight)
    assert again.dtype == torch.float16 and torch.equal(again.dequantize(torch.float32), before)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), r"shape \(3,\); an Int8Store keeps a non-empty 2-D weight"),
        (torch.zeros(0, 3), "non-empty"),
        (torch.zeros(2, 3, dtype=torch.int32), "torch.int32 .* of floating point numbers"),
        (torch.tensor([[1.0, torch.nan]]), "has a NaN or an infinity"),
        (torch.tensor([[1.0, torch.inf]]), "has a NaN or an infinity"),
    ],
)
def test_a_weight_that_has_no_codes_is_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        Int8Store(weight)


@pytest.mark.parametrize("shape", [(7, 5), (24, 24)])
def test_an_adapter_over_it_is_one_over_its_values(shape):
    """In value and gradient; the contract under `slow` has every variant over it."""
    store = Int8Store(weight_of(shape))
    layers = [
        LoraLinear(kept, None, path="x", seed=0, rank=2, alpha=4)
        for kept in (store, DenseStore(store.dequantize(torch.float32)))
    ]
    x = torch.randn(3, shape[1], requires_grad=True)
    for layer in layers:
        layer.B.data += 0.1
    ours, theirs = (layer(x) for layer in layers)
    torch.testing.assert_close(ours, theirs)
    wanted = [torch.autograd.grad(y.square().sum(), [x, layer.A, layer.B])
              for y, layer in zip((ours, theirs), layers, strict=True)]  # fmt: skip
    torch.testing.assert_close(*wanted)
