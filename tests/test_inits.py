"""Starts that look at W: how the base stays whole, and what is refused."""

import pytest
import torch

from variants import DenseStore, DoraLinear, LoraLinear, Nf4Store

STORES = pytest.mark.parametrize("store", [DenseStore, Nf4Store])


def leading(W, *, rank, scale, **_):
    """The leading part of W, all on B's side but for the directions."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * S[:rank] / scale, Vh[:rank]


def weight(decay=0.5):
    """A weight (16, 24) whose singular values fall, so that it has a leading part."""
    generator = torch.Generator().manual_seed(1)
    U, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(24, 16, generator=generator))
    return U * decay ** torch.arange(16) @ V.T


def layer_of(store=DenseStore, kind=LoraLinear, W=None, **options):
    W = weight() if W is None else W
    options = {"rank": 4, "alpha": 8, "init": leading, "init_base": "residual", **options}
    return kind(store(W), None, path="q", seed=0, weight=W, **options)


def test_a_residual_is_what_the_store_keeps():
    layer, W = layer_of(), weight()
    S = torch.linalg.svdvals(layer.store.weight)
    torch.testing.assert_close(S[:12], 0.5 ** torch.arange(4.0, 16), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(layer.base_weight(), W)
    torch.testing.assert_close(layer.adapted_weight(), W)


def test_a_quantised_residual_is_nearer_to_the_weight_than_the_quantised_weight():
    W = weight()
    residual, plain = layer_of(Nf4Store), Nf4Store(W).dequantize(torch.float32)
    error, of_nf4 = (residual.adapted_weight() - W).norm(), (plain - W).norm()
    assert error < 0.2 * of_nf4
    offset = layer_of(Nf4Store, init_base="offset")
    torch.testing.assert_close(offset.adapted_weight(), plain, rtol=0, atol=1e-6)
    settings = layer_of(lambda W: Nf4Store(W, block=128, double_quantization=False)).store
    assert (settings.block, settings.double_quantization) == (128, False)


@STORES
@pytest.mark.parametrize("base", ["offset", "residual"])
def test_a_magnitude_stands_on_the_same_start(store, base):
    layer = layer_of(store, DoraLinear, init_base=base)
    assert torch.equal(layer.gain(), torch.ones(16))
    torch.testing.assert_close(layer.m, layer.base_weight().norm(dim=1), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        layer.B += 0.1
    V = layer.store.dequantize(torch.float32) + layer.scale * layer.B @ layer.A
    if base == "offset":
        V = V - layer.scale * layer.B0 @ layer.A0
    x = torch.randn(5, 24)
    expected = x @ (layer.m / V.norm(dim=1) * V.T).detach()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_the_store_keeps_its_dtype():
    layer = layer_of(W=weight().bfloat16())
    assert layer.store.weight.dtype == layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.adapted_weight(), weight(), rtol=0.02, atol=5e-3)


def test_a_residual_of_another_start_is_refused():
    layer, state = layer_of(), layer_of().adapter_state()
    layer.load_adapter_state(state)
    other = layer_of(W=weight(0.6)).adapter_state()
    with pytest.raises(ValueError, match="q starts from other factors here than where it was"):
        layer.load_adapter_state(other)
    layer_of(init_base="offset").load_adapter_state(other)  # which keeps them


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_base": None}, "init_base is zero, but B A of q is not"),
        ({"init_base": "zero"}, "init_base is zero, but B A of q is not"),
        ({"init_base": "whole"}, "init_base is 'whole'; it must be zero, offset or residual"),
        ({"init_offset": True}, "init_offset is true; it must be false with init_base 'residual'"),
        ({"init_A": "gaussian"}, "init is given; leave init_A, init_B and init_gain out"),
        ({"init": None, "init_B": "matched", "init_base": "zero"}, "init_base is zero, but B A"),
        ({"init": lambda W, **_: (W, W)}, "B of .16, 24. and A of .16, 24.; they must be 16 x 4"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**options)
