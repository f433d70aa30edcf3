"""DoRA against the paper's formula in float64, and against peft from copied state."""

import copy
import warnings

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from variants import DenseStore, DoraLinear, Nf4Store, Variant, begin_step, by_role, inject

SHAPES = [(7, 5), (16, 33), (65, 64), (24, 24)]  # of a square one every axis is taken
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
detached_or_not = pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "full"])


def layer_of(shape=(16, 33), *, bias=True, disturbed=True, store=DenseStore, **options):
    generator = torch.Generator().manual_seed(1)
    W, b = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    options = {"seed": 0, "rank": 3, "alpha": 6.0, **options}
    layer = DoraLinear(store(W), b if bias else None, path="query", **options)
    if disturbed:
        with torch.no_grad():
            for parameter in layer.roles().values():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return layer


def arrays(*tensors):
    return [tensor.detach().double().numpy() for tensor in tensors]


def state_of(layer):
    """W, B, A, s, m in float64."""
    W, B, A, m = arrays(layer.store.dequantize(torch.float32), layer.B, layer.A, layer.m)
    return W, B, A, layer.scale, m


def true_norm(layer):
    W, B, A, s, _ = state_of(layer)
    return np.linalg.norm(W + s * (B @ A), axis=1)


def assert_near(actual, expected, tolerance=1e-5):
    """Within `tolerance` of the largest entry expected."""
    actual = actual.detach().double().numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# ---- against the formula ------------------------------------------------------------------------


@every_shape
@detached_or_not
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("store", [DenseStore, Nf4Store])
def test_values_and_gradients_are_the_papers(shape, detach_norm, bias, store, threads):
    layer = layer_of(shape, bias=bias, detach_norm=detach_norm, store=store)
    x, dy = torch.randn(12, shape[1], requires_grad=True), torch.randn(12, shape[0])
    y = layer(x)
    y.backward(dy)
    W, B, A, s, m = state_of(layer)
    weight = oracle.dora_weight(W, B, A, s, m)
    b = arrays(layer.bias)[0] if bias else 0.0  # not scaled
    assert_near(y, arrays(x)[0] @ weight.T + b)
    assert_near(layer.adapted_weight(), weight)
    wanted = oracle.dora_gradients(*arrays(x, dy), W, B, A, s, m, detach_norm)
    for role, tensor in {"x": x, "B": layer.B, "A": layer.A, "m": layer.m}.items():
        assert_near(tensor.grad, wanted[role], 2e-5)


def test_the_oracles_full_gradient_is_that_of_finite_differences():
    x, dy = arrays(torch.randn(6, 5), torch.randn(6, 7))
    W, B, A, s, m = state_of(layer_of((7, 5)))

    def loss():
        return float(np.sum(dy * (x @ oracle.dora_weight(W, B, A, s, m).T)))

    wanted = oracle.dora_gradients(x, dy, W, B, A, s, m, detach_norm=False)
    for role, array in {"x": x, "B": B, "A": A, "m": m}.items():
        np.testing.assert_allclose(
            wanted[role], oracle.central_differences(loss, array), rtol=1e-6, atol=1e-7
        )


def test_detaching_loses_the_projection_alone():
    x, dy = torch.randn(6, 33), torch.randn(6, 16)
    gradients = {}
    for detach_norm in (True, False):
        layer = layer_of(detach_norm=detach_norm)
        layer(x).backward(dy)
        gradients[detach_norm] = layer
    detached, full = gradients[True], gradients[False]
    assert torch.allclose(detached.m.grad, full.m.grad, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(detached.B.grad, full.B.grad, rtol=0.01)
    # <dL/dW', V' / ||V'||> for the magnitude
    W, B, A, s, _ = state_of(detached)
    G = arrays(dy)[0].T @ arrays(x)[0]
    V = W + s * (B @ A)
    assert_near(detached.m.grad, np.sum(G * V, axis=1) / np.linalg.norm(V, axis=1))


@every_shape
def test_there_is_a_norm_for_each_output(shape):
    layer = layer_of(shape, disturbed=False)
    assert layer.m.shape == (shape[0],)
    np.testing.assert_allclose(
        arrays(layer.m)[0], np.linalg.norm(arrays(layer.store.weight)[0], axis=1), rtol=1e-6
    )


@pytest.mark.parametrize("store", [DenseStore, Nf4Store])
@pytest.mark.parametrize("init", [{}, {"init_B": "kaiming"}], ids=str)
@every_shape
def test_the_gain_starts_at_one_to_the_bit(shape, store, init):
    layer = layer_of(shape, disturbed=False, store=store, **init)
    assert torch.equal(layer.gain(), torch.ones(shape[0]))
    with torch.no_grad():
        assert torch.equal(layer.gain(), torch.ones(shape[0]))


def test_a_small_change_of_magnitude_survives_bfloat16():
    layer = layer_of(disturbed=False, compute_dtype=torch.bfloat16)
    x = torch.randn(40, 33)
    before = layer(x)
    with torch.no_grad():
        layer.m *= 1.002  # in bfloat16 1.002 is 1, and 1.002 z is mostly z
    change = ((layer(x) - layer.bias) / (before - layer.bias)).detach()
    torch.testing.assert_close(change, torch.full_like(change, 1.002), rtol=1e-3, atol=0)


def test_rows_of_zero_magnitude_have_the_right_gradients():
    layer = layer_of()
    with torch.no_grad():
        layer.m[::2] = 0.0
    x, dy = torch.randn(9, 33, requires_grad=True), torch.randn(9, 16)
    layer(x).backward(dy)
    W, B, A, s, m = state_of(layer)
    wanted = oracle.dora_gradients(*arrays(x, dy), W, B, A, s, m, detach_norm=True)
    assert np.abs(wanted["m"][::2]).min() > 0  # z cannot be recovered from y here
    for role, tensor in {"x": x, "B": layer.B, "A": layer.A, "m": layer.m}.items():
        assert_near(tensor.grad, wanted[role])


@detached_or_not
def test_a_zero_row_of_the_base_starts_and_trains_finitely(detach_norm):
    W = torch.randn(6, 9)
    W[2] = 0.0
    layer = DoraLinear(
        DenseStore(W), None, path="q", seed=0, rank=2, alpha=2, detach_norm=detach_norm
    )
    x = torch.randn(5, 9)
    assert torch.equal(layer.gain(), torch.ones(6))
    torch.testing.assert_close(layer(x), x @ W.T)
    optimizer = torch.optim.AdamW(layer.roles().values(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        assert all(p.isfinite().all() and p.grad.isfinite().all() for p in layer.roles().values())
        assert layer(x).isfinite().all()


def test_the_first_norm_is_taken_where_the_base_lies():
    """A model on an accelerator (meta stands for one) is adapted there: W and A meet in init."""
    layer = DoraLinear(
        DenseStore(torch.empty(16, 33, device="meta")), None, path="q", seed=0, rank=3, alpha=6
    )
    assert {p.device.type for p in layer.roles().values()} == {"meta"}


# ---- the factored norm --------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("std", [1e-4, 0.03, 1.0, 30.0])
def test_the_factored_norm_is_the_dense_one(shape, std):
    layer = layer_of(shape, disturbed=False)
    with torch.no_grad():
        layer.A.normal_(0, std)
        layer.B.normal_(0, std)
    np.testing.assert_allclose(arrays(layer.row_norm())[0], true_norm(layer), rtol=1e-5)


@pytest.mark.parametrize("left", [0.5, 0.1, 1e-2, 1e-3, 0.0])
def test_cancellation_costs_no_more_than_the_rounding_of_the_base(left):
    """B A = -(1 - left) W / s. The sum of three terms loses what ||W||^2 rounds to."""
    layer = layer_of((5, 7), rank=5, alpha=5.0, disturbed=False)
    W = layer.store.weight
    with torch.no_grad():
        layer.B.copy_(torch.eye(5))
        layer.A.copy_(-(1 - left) * W)
    norm, base = true_norm(layer), np.linalg.norm(arrays(W)[0], axis=1)
    found = arrays(layer.row_norm())[0]
    assert np.all(found > 0)
    assert np.all(np.abs(found**2 - norm**2) <= 1e-6 * base**2)
    # However little is left of a row, it is not blown up.
    x = torch.randn(4, 7)
    assert layer(x).isfinite().all()
    bound = torch.linalg.vector_norm(x) * layer.m.max()
    assert layer.eval()(x).sub(layer.bias).abs().max() <= 1.1 * bound


def counted(layer, monkeypatch):
    calls = []
    compute = layer._compute_row_norm
    monkeypatch.setattr(layer, "_compute_row_norm", lambda: calls.append(0) or compute())
    return calls


def assert_fresh(layer):
    """The norm in use is the true one, with and without gradients."""
    with torch.no_grad():
        np.testing.assert_allclose(arrays(layer.row_norm())[0], true_norm(layer), rtol=1e-5)
    np.testing.assert_allclose(arrays(layer.row_norm())[0], true_norm(layer), rtol=1e-5)


def test_an_evaluation_computes_the_norm_once(monkeypatch):
    layer, x = layer_of().eval(), torch.randn(3, 33)
    calls = counted(layer, monkeypatch)
    with torch.no_grad():
        outputs = [layer(x) for _ in range(4)]
    assert len(calls) == 1
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert torch.equal(layer(x), outputs[0])  # with gradients
    assert len(calls) == 2


@pytest.mark.parametrize("detach_norm", [True, False])
def test_a_step_computes_the_norm_once(monkeypatch, detach_norm):
    layer, x = layer_of(detach_norm=detach_norm), torch.randn(3, 33)
    optimizer = torch.optim.AdamW(layer.roles().values(), lr=0.05, fused=True)
    calls = counted(layer, monkeypatch)
    for step in (1, 2):
        for microstep in range(4):
            begin_step({"query": layer}, step, microstep)
            layer(x).square().sum().backward()
        assert len(calls) == (1 if detach_norm else 4) * step
        gradients = [parameter.grad.clone() for parameter in layer.roles().values()]
        optimizer.zero_grad()
        for _ in range(4):
            begin_step({"query": layer}, step)
            layer(x).square().sum().backward()
        assert len(calls) == (1 if detach_norm else 4) * step + 4
        for parameter, wanted in zip(layer.roles().values(), gradients, strict=True):
            assert torch.equal(parameter.grad, wanted)
        del calls[-4:]
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "announce",
    [
        lambda layers, step: begin_step(layers, step),
        lambda layers, step: begin_step(layers, step, 1),
        lambda layers, step: begin_step(layers, 1),
        lambda layers, step: step > 1 or begin_step(layers, 1),
        lambda layers, step: None,
    ],
)
def test_no_step_leaves_a_stale_norm(announce, fused):
    """A fused optimiser writes parameters without raising their version."""
    layer, x = layer_of(), torch.randn(3, 33)
    optimizer = torch.optim.AdamW(layer.roles().values(), lr=0.05, fused=fused)
    for step in range(1, 5):
        announce({"query": layer}, step)
        before = true_norm(layer)
        np.testing.assert_allclose(arrays(layer.row_norm())[0], before, rtol=1e-5)
        layer(x).square().sum().backward()
        with torch.no_grad():  # the loss once more, say, before the step
            layer.eval()(x)
        layer.train()
        optimizer.step()
        optimizer.zero_grad()
        assert not np.allclose(true_norm(layer), before, rtol=1e-3)
        layer.eval()
        assert_fresh(layer)
        layer.train()
        with torch.no_grad():
            np.testing.assert_allclose(arrays(layer.row_norm())[0], true_norm(layer), rtol=1e-5)


def test_what_else_replaces_the_factors_is_noticed():
    layer = layer_of().eval()

    def evaluate():
        with torch.no_grad():
            np.testing.assert_allclose(arrays(layer.row_norm())[0], true_norm(layer), rtol=1e-5)

    evaluate()
    with torch.no_grad():
        layer.A.mul_(3.0)
    evaluate()
    layer.load_adapter_state(layer_of(seed=8).adapter_state())
    evaluate()
    layer.take({"B": torch.randn(16, 3), "A": torch.randn(3, 33)}, 2.0)
    evaluate()
    layer.B.data = layer.B.data * 2
    layer.eval()
    evaluate()
    assert_fresh(copy.deepcopy(layer))


def test_evaluation_in_inference_mode_leaves_a_layer_that_trains():
    layer = layer_of().eval()
    x = torch.randn(3, 33)
    with torch.inference_mode():
        layer(x)
    layer(x).square().sum().backward()
    assert layer.m.grad.isfinite().all()
    with torch.no_grad():
        layer(x)


def test_a_compiled_pass_keeps_no_norm():
    layer = layer_of().eval()
    with torch.no_grad():
        layer(torch.randn(3, 33))
    assert layer._norm is not None
    torch.compiler.reset()
    torch.compile(layer, backend="eager")(torch.randn(3, 33))
    assert layer._norm is None


# ---- dropout of the magnitude's input -----------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_magnitude_dropout_is_the_authors_formula(bias):
    layer = layer_of(bias=bias, dropout=0.4, magnitude_dropout=True).train()
    begin_step({"query": layer}, 1)
    x = torch.randn(2, 5, 33, requires_grad=True)
    y = layer(x)
    assert y.shape == (2, 5, 16)
    rows = x.view(10, 33)
    keep = layer.mask()(rows.shape, x.device, x.dtype).double().numpy()
    W, B, A, s, m = state_of(layer)
    b = arrays(layer.bias)[0] if bias else 0.0
    expected = oracle.dora_magnitude_dropout(*arrays(rows), W, b, B, A, s, m, keep, 0.4)
    assert_near(y.view(10, 16), expected)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.roles().values())

    plain = layer_of(bias=bias)
    assert torch.equal(layer.eval()(x), plain.eval()(x))  # evaluation drops nothing
    layer.train().dropout = 0.0
    assert torch.equal(layer(x), plain(x))


def test_magnitude_dropout_in_bfloat16():
    layer = layer_of(dropout=0.4, magnitude_dropout=True).train()
    begin_step({"query": layer}, 1)
    x = torch.randn(6, 33)
    wide = layer(x)
    layer.compute_dtype = torch.bfloat16
    assert layer(x).dtype == torch.float32
    assert (layer(x) - wide).abs().max() < 0.03 * wide.abs().max()


# ---- peft as oracle -----------------------------------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(33, 17)
        self.second = nn.Linear(17, 9, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_peft_takes_the_same_course():
    import peft

    base = TwoLayers().eval()
    model = copy.deepcopy(base)

    def adapter(*arguments, **given):
        return DoraLinear(*arguments, rank=4, alpha=12, **given)

    variant = Variant(name="test", lr=1e-2, adapter=adapter, groups=by_role)
    layers = inject(model, variant, seed=0)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["first", "second"], use_dora=True, lora_dropout=0.0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        theirs = peft.get_peft_model(base, config)
    theirs.train()
    model.train()
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    pairs = []
    for path, layer in layers.items():
        root = f"base_model.model.{path}"
        for role, name in (
            ("A", f"{root}.lora_A.default.weight"),
            ("B", f"{root}.lora_B.default.weight"),
            ("m", f"{root}.lora_magnitude_vector.default.weight"),
        ):
            ours, peers = layer.roles()[role], trained.pop(name)
            with torch.no_grad():
                ours += 0.3 * torch.randn(ours.shape)
                peers.copy_(ours)
            pairs.append((ours, peers))
    assert not trained
    start = [ours.detach().clone() for ours, _ in pairs]
    # eps as large as a typical gradient's rounding: Adam turns the sign of a vanishing gradient,
    # which float32 does not determine, into a whole step.
    optimizers = [
        torch.optim.AdamW([pair[side] for pair in pairs], lr=1e-2, weight_decay=0.1, eps=1e-4)
        for side in (0, 1)
    ]
    for step in range(20):
        x = torch.randn(6, 33)
        outputs = [model(x), theirs(x)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(output, torch.ones(6, 9)).backward()
        for ours, peers in pairs:
            torch.testing.assert_close(ours.grad, peers.grad, rtol=1e-3, atol=1e-4)
            if step == 0:
                torch.testing.assert_close(ours.grad, peers.grad, rtol=1e-4, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
    for (ours, peers), first in zip(pairs, start, strict=True):
        torch.testing.assert_close(ours, peers, rtol=0, atol=1e-3)
        assert (ours - first).abs().max() > 0.05
