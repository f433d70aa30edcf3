"""Energy-rank AdaLoRA against its formulas in numpy, on disturbed weights and odd shapes."""

import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from variants import AdapterLinear, DenseStore, LowRankLinear, after_step
from variants.adalora import AdaLoraLinear
from variants.adalora_energy import EnergyAllocator
from variants.spectrum import energy_rank
from variants.streams import draw_rows

# ---- oracle: numpy float64, dense (o, i) products, nothing from variants -------------------------


def oracle_rank(B, A, epsilon, min_rank):
    """Count up from nothing until what is left out is small enough."""
    energy = np.linalg.svd(B @ A, compute_uv=False)[: A.shape[0]] ** 2
    k = 0
    while energy[k:].sum() > epsilon * energy.sum():
        k += 1
    return max(k, min_rank)


def oracle_truncation(B, A, k):
    U, S, Vh = np.linalg.svd(B @ A, full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vh[:k], S


def oracle_bases(B, A, new_B, new_A):
    """T and T+ from what they must do, B' = B T and A' = T+ A, by least squares."""
    return np.linalg.pinv(B) @ new_B, new_A @ np.linalg.pinv(A)


def oracle_moments(m, v, basis, *, columns):
    """Adam's moments, free of bias correction; `basis` (k', k) acts on ranks. Row by row."""
    m, v = (m.T, v.T) if columns else (m, v)
    new_m, new_v = np.zeros((len(basis), m.shape[1])), np.zeros((len(basis), m.shape[1]))
    for new in range(len(basis)):
        for old in range(len(m)):
            new_m[new] += basis[new, old] * m[old]
        for old in range(len(m)):
            new_v[new] += basis[new, old] ** 2 * np.maximum(v[old] - m[old] ** 2, 0)
        new_v[new] += new_m[new] ** 2
    return (new_m.T, new_v.T) if columns else (new_m, new_v)


# ---- parts ---------------------------------------------------------------------------------------

SHAPES = [(7, 5, 3), (5, 11, 4), (13, 6, 6), (9, 9, 1), (33, 17, 8), (4, 29, 2)]


def make_layer(o=9, i=7, rank=4, *, path="block.0.q", seed=0, spectrum=None, **options):
    """A layer whose B A is random, or has the singular values `spectrum` on unbalanced factors."""
    generator = torch.Generator().manual_seed(seed + 100)
    store = DenseStore(torch.randn(o, i, generator=generator))
    layer = AdaLoraLinear(store, None, path=path, seed=seed, rank=rank, alpha=1.5 * rank, **options)
    B = torch.randn(o, rank, generator=generator, dtype=torch.float64)
    A = torch.randn(rank, i, generator=generator, dtype=torch.float64)
    if spectrum is not None:
        mix = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
        values = torch.tensor(spectrum, dtype=torch.float64)
        B = torch.linalg.qr(B).Q * values @ mix
        A = torch.linalg.inv(mix) @ torch.linalg.qr(A.T).Q.T
    with torch.no_grad():
        layer.B[:, :rank] = B
        layer.A[:rank] = A
    return layer


def make_allocator(layers, **options):
    """Cuts at every step from 1 to 1000 unless told otherwise."""
    defaults = {"total_steps": 1000, "seed": 0, "interval": 1, "window": (0.0, 1.0)}
    return EnergyAllocator(layers, **{**defaults, **options})


def adamw(layer, **options):
    return torch.optim.AdamW([layer.B, layer.A], lr=1e-3, **options)


def random_steps(layer, optimizer, count, seed=0):
    """Steps along s G A^T and s B^T G, with G in part common to all steps: |m| is near sqrt(v)."""
    generator = torch.Generator().manual_seed(seed)
    shape = layer.out_features, layer.in_features
    common = torch.randn(shape, generator=generator)
    for _ in range(count):
        optimizer.zero_grad()
        B, A = layer.factors()
        (
            (common + torch.randn(shape, generator=generator)) * (layer.scale * B @ A)
        ).sum().backward()
        optimizer.step()


def arrays(layer):
    return tuple(factor.detach().double().numpy().copy() for factor in layer.factors())


def corrected(optimizer, parameter, k, *, columns, second="exp_avg_sq"):
    """(m, v, step) of the first k directions, free of bias correction, float64."""
    state = optimizer.state[parameter]
    betas = next(
        g["betas"] for g in optimizer.param_groups if any(parameter is p for p in g["params"])
    )
    step = float(state["step"])
    m, v = (
        (state[name][:, :k] if columns else state[name][:k]).double().numpy() / (1 - beta**step)
        for name, beta in zip(("exp_avg", second), betas, strict=True)
    )
    return m, v, step


def assert_zero_beyond(layer, optimizer=None):
    k = layer.active_rank()
    tensors = [(layer.B, True), (layer.A, False)]
    for parameter, columns in list(tensors):
        for value in optimizer.state[parameter].values() if optimizer else ():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                tensors.append((value, columns))
    for tensor, columns in tensors:
        assert not (tensor[:, k:] if columns else tensor[k:]).any()


# ---- the layer -----------------------------------------------------------------------------------


def test_starts_from_the_same_rows_as_lora_and_prefix_is_active():
    store = DenseStore(torch.randn(11, 6))
    layer = AdaLoraLinear(
        store, None, path="a.b", seed=3, rank=4, alpha=2.0, max_rank=6, min_rank=2
    )
    expected = draw_rows(4, 6, 3, "a.b", "A", std=(1 / 18) ** 0.5)
    B, A = layer.factors()
    assert torch.equal(A, expected) and not B.any()
    assert (B.shape, A.shape, layer.active_rank()) == ((11, 4), (4, 6), 4)
    assert (layer.B.shape, layer.A.shape) == ((11, 6), (6, 6))
    assert layer.scale == 0.5  # alpha / rank: not / max_rank, and never / k
    assert set(layer.roles()) == {"A", "B"}
    assert_zero_beyond(layer)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), x @ store.weight.T)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_definition_on_a_partly_active_layer(shape, bias):
    o, i, rank = shape
    layer = make_layer(o, i, rank, max_rank=min(o, i), min_rank=1)
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(o), requires_grad=False)
    x = torch.randn(2, 3, i, dtype=torch.float64)
    B, A = arrays(layer)
    W = layer.store.weight.double().numpy() + 1.5 * B @ A
    expected = x.numpy() @ W.T + (layer.bias.double().numpy() if bias else 0)
    np.testing.assert_allclose(layer(x.float()).detach().numpy(), expected, atol=1e-4)
    layer(x.float()).square().sum().backward()
    assert layer.A.grad[rank:].abs().sum() == 0 and layer.B.grad[:, rank:].abs().sum() == 0
    assert layer.A.grad[:rank].abs().sum() > 0


@pytest.mark.parametrize(
    "ranks", [(3, 5, 4), (0, 4, 4), (1, 5, 4), (1, 4, 8), (1, 0, 4), (5, 4, 4), (1, 8, None)]
)
def test_ranks_out_of_order_are_named_with_the_layer(ranks):
    min_rank, rank, max_rank = ranks
    if ranks == (3, 5, 4):
        min_rank, rank, max_rank = 3, 2, 4
    with pytest.raises(ValueError, match=r"^block\.0\.q is 9 x 7, so ranks must satisfy"):
        make_layer(9, 7, rank, min_rank=min_rank, max_rank=max_rank)


# ---- the cut -------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("shape", SHAPES)
def test_cut_is_the_truncated_svd_with_balanced_factors(shape, epsilon):
    for seed in range(4):
        layer = make_layer(*shape, seed=seed, min_rank=min(2, shape[2]))
        optimizer = adamw(layer)
        B, A = arrays(layer)
        k = oracle_rank(B, A, epsilon, layer.min_rank)
        expected, S = oracle_truncation(B, A, k)
        log = make_allocator({"l": layer}, epsilon=epsilon).after_step({"l": layer}, optimizer, 1)
        new_B, new_A = arrays(layer)
        assert layer.active_rank() == k == new_A.shape[0]
        np.testing.assert_allclose(new_B @ new_A, expected, atol=1e-5 * S[0])
        np.testing.assert_allclose(new_B.T @ new_B, np.diag(S[:k]), atol=1e-5 * S[0])
        np.testing.assert_allclose(new_A @ new_A.T, np.diag(S[:k]), atol=1e-5 * S[0])
        lost = (S[k:] ** 2).sum() / (S**2).sum()
        assert log["rank/discarded_energy_max"] == pytest.approx(lost, abs=1e-9)
        assert log["rank/mean"] == k and log["rank/removed"] == shape[2] - k
        assert_zero_beyond(layer)
        # The bound: ||change of s B A||_F <= s sqrt(epsilon) ||B A||_F.
        change = np.linalg.norm(layer.scale * (new_B @ new_A - B @ A))
        norm = np.linalg.norm(B @ A)
        if lost <= epsilon:
            assert change <= layer.scale * (epsilon**0.5 + 1e-6) * norm
        assert change == pytest.approx(layer.scale * lost**0.5 * norm, abs=1e-5 * norm)


@pytest.mark.parametrize(
    ("spectrum", "epsilon", "min_rank", "k"),
    [
        ([3.0, 2.0, 1.0], 1 / 14 + 1e-6, 1, 2),  # energies 9, 4, 1: just enough
        ([3.0, 2.0, 1.0], 1 / 14 - 1e-6, 1, 3),  # just not
        ([3.0, 2.0, 1.0], 0.99, 1, 1),
        ([3.0, 2.0, 1.0], 0.99, 2, 2),
        ([2.0, 2.0, 2.0, 2.0], 0.3, 1, 3),  # a tie: as many go as may, the lower indices stay
        ([2.0, 2.0, 2.0, 2.0], 0.51, 1, 2),
        ([1.0, 1e-3, 1e-3], 1e-5, 1, 1),
    ],
)
def test_energy_rule_on_known_spectra(spectrum, epsilon, min_rank, k):
    layer = make_layer(9, 7, len(spectrum), spectrum=spectrum, min_rank=min_rank)
    make_allocator({"l": layer}, epsilon=epsilon).after_step({"l": layer}, adamw(layer), 1)
    assert layer.active_rank() == k
    S = np.linalg.svd(np.matmul(*arrays(layer)), compute_uv=False)[:k]
    np.testing.assert_allclose(S, spectrum[:k], rtol=1e-5)


def test_exactly_epsilon_may_be_discarded():
    assert energy_rank(torch.tensor([2.0, 2.0]), 0.5, 1, 9) == 1
    assert energy_rank(torch.tensor([2.0, 1.0, 0.0]), 0.0, 1, 9) == 2
    assert energy_rank(torch.tensor([2.0, 1.0, 0.0]), 0.0, 1, 1) == 1


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.3])
def test_repeated_cuts_keep_their_share_of_the_energy(epsilon):
    for seed in range(5):
        layer = make_layer(33, 17, 8, seed=seed)
        allocator, optimizer = make_allocator({"l": layer}, epsilon=epsilon), adamw(layer)
        start = np.linalg.norm(np.matmul(*arrays(layer))) ** 2
        for J in range(1, 7):
            allocator.after_step({"l": layer}, optimizer, J)
            energy = np.linalg.norm(np.matmul(*arrays(layer))) ** 2
            assert energy >= ((1 - epsilon) ** J - 1e-6) * start


def test_rebuild_only_is_no_change_of_the_function():
    layer = make_layer(33, 17, 8, min_rank=8)
    before = layer.delta_weight()
    layer.merge()
    version = layer.B._version
    log = make_allocator({"l": layer}, epsilon=0.0).after_step({"l": layer}, adamw(layer), 1)
    assert layer.active_rank() == 8 and layer.cuts == 1
    assert layer.B._version > version  # caches keyed by version notice
    assert layer.merged_weight is None
    torch.testing.assert_close(layer.delta_weight(), before, atol=1e-5, rtol=1e-5)
    assert not [key for key in log if key.startswith("rank/discarded_energy/")]


def test_nothing_is_cut_while_nothing_is_learnt():
    layer = make_layer(9, 7, 4)
    with torch.no_grad():
        layer.B.zero_()
    allocator, optimizer = make_allocator({"l": layer}), adamw(layer)
    A = layer.A.detach().clone()
    assert allocator.after_step({"l": layer}, optimizer, 1) == {}
    assert torch.equal(layer.A, A) and layer.active_rank() == 4 and layer.cuts == 0
    with torch.no_grad():  # ||B A|| just below, then just above, the threshold
        layer.B[0, 0] = 0.9e-6 * layer.A.norm() / layer.A[0].norm()
    assert allocator.after_step({"l": layer}, optimizer, 2) == {}
    with torch.no_grad():
        layer.B[0, 0] *= 1.3
    assert allocator.after_step({"l": layer}, optimizer, 3)["rank/mean"] == 1


def test_directions_that_only_min_rank_keeps_are_drawn_anew():
    spectrum = [1.0, 0.5, 0.99e-4, 1e-6, 1e-9]
    layer = make_layer(12, 10, 5, spectrum=spectrum, min_rank=4)
    optimizer = adamw(layer)
    random_steps(layer, optimizer, 3)
    with torch.no_grad():  # as the cut will find them; the moments stay
        fresh = make_layer(12, 10, 5, spectrum=spectrum)
        layer.B.copy_(fresh.B)
        layer.A.copy_(fresh.A)
    log = make_allocator({"l": layer}).after_step({"l": layer}, optimizer, 1)
    assert layer.active_rank() == 4 and layer.removed == 1 and log["rank/redrawn"] == 2
    lost = sum(value**2 for value in spectrum[2:]) / 1.25
    assert log["rank/discarded_energy_max"] == pytest.approx(lost, rel=1e-2)
    A, B = layer.A.detach().double(), layer.B.detach()
    assert not B[:, 2:].any()
    torch.testing.assert_close(A[2:4].norm(dim=1), torch.full((2,), 3**-0.5, dtype=torch.float64))
    unit = A[:4] / A[:4].norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit @ unit.T, torch.eye(4, dtype=torch.float64), atol=1e-5, rtol=0)
    for parameter, columns in ((layer.B, True), (layer.A, False)):
        m, v, _ = corrected(optimizer, parameter, 4, columns=columns)
        m, v = (m.T, v.T) if columns else (m, v)
        assert not m[2:].any()
        np.testing.assert_allclose(v[2:], np.tile(v[:2].mean(0), (2, 1)), rtol=1e-5)
    assert_zero_beyond(layer, optimizer)


def test_cuts_fall_on_multiples_of_the_interval_inside_the_window():
    cut = []
    layer = make_layer(9, 7, 4, min_rank=4)
    allocator = make_allocator(
        {"l": layer}, total_steps=100, interval=5, window=(0.29, 0.7), epsilon=0.0
    )
    for step in range(1, 101):
        if allocator.after_step({"l": layer}, adamw(layer), step):
            cut.append(step)
    assert cut == [30, 35, 40, 45, 50, 55, 60, 65, 70]
    # In floating point 0.07 * 100 is more than 7 and 0.29 * 100 less than 29.
    allocator = make_allocator({"l": layer}, total_steps=100, interval=7, window=(0.07, 0.29))
    assert (allocator.first_step, allocator.last_step) == (7, 29)
    make_allocator({"l": layer}, total_steps=100, interval=30, window=(0.3, 0.3))  # one cut
    # Not before the window, nor after it.
    allocator = make_allocator({"l": layer}, total_steps=10, window=(0.25, 0.75))
    assert (allocator.first_step, allocator.last_step) == (3, 7)


# ---- Adam through the change of basis ------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"fused": True}, {"betas": (0.5, 0.9)}])
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_carried_as_the_formulas_say(shape, options):
    for seed, epsilon in enumerate((0.0, 0.05, 0.4)):
        layer = make_layer(*shape, seed=seed, max_rank=min(shape[:2]))
        optimizer = adamw(layer, **options)
        random_steps(layer, optimizer, 3, seed)
        B, A = arrays(layer)
        seconds = ["exp_avg_sq", "max_exp_avg_sq"] if "amsgrad" in options else ["exp_avg_sq"]
        sides = [(layer.B, True), (layer.A, False)]
        before = {
            (columns, second): corrected(optimizer, p, shape[2], columns=columns, second=second)
            for p, columns in sides
            for second in seconds
        }
        make_allocator({"l": layer}, epsilon=epsilon).after_step({"l": layer}, optimizer, 1)
        T, T_plus = oracle_bases(B, A, *arrays(layer))
        for parameter, columns in sides:
            basis = T_plus if columns else T.T
            for second in seconds:
                m, v, step = before[columns, second]
                expected_m, expected_v = oracle_moments(m, v, basis, columns=columns)
                m, v, new_step = corrected(
                    optimizer, parameter, layer.active_rank(), columns=columns, second=second
                )
                assert new_step == step == 3
                np.testing.assert_allclose(m, expected_m, rtol=1e-3, atol=1e-4 * abs(m).max())
                np.testing.assert_allclose(v, expected_v, rtol=1e-3, atol=1e-4 * v.max())
        assert_zero_beyond(layer, optimizer)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_first_moments_stay_the_gradient_in_the_new_factors(optimizer_class):
    """A moment that holds the gradient for one G = dL/d(sBA) must still do so, pruned or not."""
    for seed, epsilon in enumerate((0.0, 0.1, 0.3)):
        layer = make_layer(15, 11, 6, seed=seed)
        G = torch.randn(15, 11)
        optimizer = torch.optim.SGD([layer.B, layer.A], lr=1e-12, momentum=0.9)
        name = "momentum_buffer"
        if optimizer_class is torch.optim.AdamW:
            optimizer, name = torch.optim.AdamW([layer.B, layer.A], lr=1e-12), "exp_avg"
        (G * (layer.factors()[0] @ layer.factors()[1])).sum().backward()
        optimizer.step()
        share = 0.1 if name == "exp_avg" else 1.0
        make_allocator({"l": layer}, epsilon=epsilon).after_step({"l": layer}, optimizer, 1)
        k = layer.active_rank()
        assert k < 6 or epsilon == 0.0
        B, A = layer.factors()
        m_B, m_A = (optimizer.state[p][name] for p in (layer.B, layer.A))
        torch.testing.assert_close(m_B[:, :k], share * G @ A.T, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(m_A[:k], share * B.T @ G, atol=1e-4, rtol=1e-4)
        assert_zero_beyond(layer, optimizer)


def test_no_moment_exceeds_the_root_of_the_second():
    """Adam's |m| <= sqrt(v); carrying v alone, as if there were no mean, breaks it."""
    worst_alone = 0.0
    for seed in range(20):
        o, i, rank = SHAPES[seed % len(SHAPES)]
        layer = make_layer(o, i, rank, seed=seed)
        optimizer = adamw(layer)
        random_steps(layer, optimizer, 1 + seed % 5, seed)
        old = corrected(optimizer, layer.B, rank, columns=True)[1]
        B, A = arrays(layer)
        make_allocator({"l": layer}, epsilon=0.1).after_step({"l": layer}, optimizer, 1)
        k = layer.active_rank()
        for parameter, columns in ((layer.B, True), (layer.A, False)):
            m, v, _ = corrected(optimizer, parameter, k, columns=columns)
            assert (abs(m) <= np.sqrt(v) * (1 + 1e-5)).all()
        m = corrected(optimizer, layer.B, k, columns=True)[0]
        alone = old @ (oracle_bases(B, A, *arrays(layer))[1].T ** 2)
        worst_alone = max(worst_alone, (abs(m) / np.sqrt(alone)).max())
    assert worst_alone > 1.2


def test_reset_forgets_moments_and_step():
    layer = make_layer(9, 7, 4)
    optimizer = adamw(layer, amsgrad=True)
    random_steps(layer, optimizer, 5)
    allocator = make_allocator({"l": layer}, moments="reset", epsilon=0.2)
    allocator.after_step({"l": layer}, optimizer, 1)
    assert layer.cuts == 1
    for parameter in (layer.A, layer.B):
        assert not any(value.any() for value in optimizer.state[parameter].values())
    before = layer.A.detach().clone()
    random_steps(layer, optimizer, 1)  # |update| is the rate, as at the first step of a run
    assert (layer.A - before).abs().max() < 1.1e-3


def test_groups_with_their_own_betas_are_honoured():
    layer, twin = make_layer(9, 7, 4), make_layer(9, 7, 4)
    for each, order in ((layer, "BA"), (twin, "AB")):
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [getattr(each, role)],
                    "betas": {"B": (0.9, 0.99), "A": (0.3, 0.7)}[role],
                }
                for role in order
            ],
            lr=1e-3,
        )
        random_steps(each, optimizer, 3)
        old = corrected(optimizer, each.A, 4, columns=False)
        B, A = arrays(each)
        make_allocator({"l": each}, epsilon=0.0).after_step({"l": each}, optimizer, 1)
        T, _ = oracle_bases(B, A, *arrays(each))
        _, v = oracle_moments(*old[:2], T.T, columns=False)
        np.testing.assert_allclose(corrected(optimizer, each.A, 4, columns=False)[1], v, rtol=1e-3)


@pytest.mark.parametrize("moments", ["transport", "reset"])
@pytest.mark.parametrize("name", ["plain SGD", "SGD", "AdamW", "never stepped"])
def test_what_is_pruned_stays_zero(name, moments):
    layer = make_layer(15, 11, 6, max_rank=8)
    optimizer = {
        "plain SGD": lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=0.1),
        "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1, nesterov=True),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        "never stepped": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    }[name]([layer.B, layer.A])
    if name != "never stepped":
        random_steps(layer, optimizer, 4)
    allocator = make_allocator({"l": layer}, epsilon=0.2, moments=moments)
    for step in range(1, 4):
        allocator.after_step({"l": layer}, optimizer, step)
        assert layer.active_rank() < 6
        assert_zero_beyond(layer, optimizer)
        random_steps(layer, optimizer, 5, seed=step)
        assert_zero_beyond(layer, optimizer)
    assert torch.isfinite(layer.delta_weight()).all()


def test_an_optimiser_that_cannot_be_carried_is_named_at_the_first_step():
    layer = make_layer()
    optimizer = torch.optim.RMSprop([layer.B, layer.A], lr=1e-3)
    random_steps(layer, optimizer, 1)
    allocator = make_allocator({"l": layer}, interval=100)
    with pytest.raises(ValueError, match=r"cannot carry RMSprop's state 'square_avg'.*AdamW"):
        allocator.after_step({"l": layer}, optimizer, 1)
    with pytest.raises(ValueError, match=r"block\.0\.q: A is in no group"):
        allocator.after_step({"l": layer}, torch.optim.SGD([layer.B], lr=1.0), 1)


# ---- growth --------------------------------------------------------------------------------------


def cut_layer(k, *, removed=0, cuts=1, **options):
    """A layer that says it was cut, with room to grow."""
    layer = make_layer(rank=k, **{"o": 15, "i": 12, "max_rank": 10, **options})
    layer.cuts.fill_(cuts)
    layer.removed.fill_(removed)
    return layer


def stagnate(allocator, layers, optimizer, *, step=500, evaluations=3):
    return [allocator.after_evaluation(layers, optimizer, step, 1.0) for _ in range(evaluations)]


def test_growth_changes_nothing_but_the_rank():
    layer = cut_layer(4, seed=5)
    optimizer = adamw(layer, weight_decay=0.1)
    random_steps(layer, optimizer, 4)
    with torch.no_grad():
        x = torch.randn(6, 12)
        y = layer(x)
    B, A = (factor.detach().clone() for factor in layer.factors())
    old = {p: corrected(optimizer, p, 4, columns=c) for p, c in ((layer.B, True), (layer.A, False))}
    allocator = make_allocator({"l": layer}, grow_by=2, seed=5)
    logs = stagnate(allocator, {"l": layer}, optimizer)
    assert logs == [{}, {}, {"rank/mean": 6.0, "rank/grown": 2.0}]
    new_B, new_A = (factor.detach() for factor in layer.factors())
    # To the bit: the old factors are untouched and every new product is with a zero.
    assert torch.equal(new_B[:, :4], B) and torch.equal(new_A[:4], A)
    assert new_B.shape[1] == 6 and not new_B[:, 4:].any()
    torch.testing.assert_close(layer(x).detach(), y, atol=1e-6, rtol=1e-6)
    rows = new_A[4:].double()
    torch.testing.assert_close(rows.norm(dim=1), torch.full((2,), 3**-0.5, dtype=torch.float64))
    assert (rows @ A.double().T).abs().max() < 1e-6 and (rows[0] @ rows[1]).abs() < 1e-6
    for parameter, columns in ((layer.B, True), (layer.A, False)):
        m, v, step = corrected(optimizer, parameter, 6, columns=columns)
        m, v, old_m, old_v = (
            t.T if columns else t for t in (m, v, old[parameter][0], old[parameter][1])
        )
        assert step == 4 and not m[4:].any()
        np.testing.assert_array_equal(m[:4], old_m)
        np.testing.assert_array_equal(v[:4], old_v)
        np.testing.assert_allclose(v[4:], np.tile(old_v.mean(0), (2, 1)), rtol=1e-5)
    assert_zero_beyond(layer, optimizer)
    random_steps(layer, optimizer, 2)
    assert layer.factors()[0][:, 4:].abs().min() > 0  # it learns
    assert_zero_beyond(layer, optimizer)


def test_new_rows_depend_on_seed_layer_and_count():
    def grown(**options):
        layer = cut_layer(4, path=options.get("path", "p"))
        layer.drawn.fill_(options.get("drawn", 0))
        allocator = make_allocator({"l": layer}, seed=options.get("seed", 0))
        stagnate(allocator, {"l": layer}, adamw(layer))
        return layer.A[4].detach()

    assert torch.equal(grown(), grown())
    for other in ({"seed": 1}, {"path": "q"}, {"drawn": 1}):
        assert (grown(**other) - grown()).abs().max() > 0.01


def test_growth_goes_to_the_layers_whose_weakest_direction_carries_most():
    layers = {
        "never cut": cut_layer(3, spectrum=[1.0, 1.0, 1.0], cuts=0),
        "just cut deep": cut_layer(3, spectrum=[1.0, 1.0, 1.0], removed=2),
        "full": cut_layer(3, spectrum=[1.0, 1.0, 1.0], max_rank=3),
        "weak": cut_layer(3, spectrum=[1.0, 1.0, 0.1]),
        "strong": cut_layer(3, spectrum=[1.0, 1.0, 0.9], removed=1),
        "medium": cut_layer(3, spectrum=[1.0, 1.0, 0.5]),
        "large but weak": cut_layer(3, spectrum=[90.0, 9.0, 2.0]),
    }
    optimizer = torch.optim.SGD([p for layer in layers.values() for p in (layer.B, layer.A)])
    logs = stagnate(make_allocator(layers, grow_layers=2), layers, optimizer)
    assert logs[-1]["rank/grown"] == 2
    assert [name for name, layer in layers.items() if layer.active_rank() == 4] == [
        "strong",
        "medium",
    ]
    allocator = make_allocator(layers)  # a tenth of seven, rounded up
    logs = stagnate(allocator, layers, optimizer)
    assert logs[-1]["rank/grown"] == 1 and layers["weak"].active_rank() == 4
    layers["weak"].removed.fill_(2)
    assert layers["large but weak"].active_rank() == 3
    stagnate(allocator, layers, optimizer)
    assert layers["large but weak"].active_rank() == 4


def test_the_weakest_direction_is_judged_by_its_share_of_all_energy():
    """0.64 of 4.64 is less than 0.36 of 1.36, though it is nearer to the strongest."""
    layers = {
        "many": cut_layer(5, spectrum=[1.0, 1.0, 1.0, 1.0, 0.8]),
        "few": cut_layer(2, spectrum=[1.0, 0.6]),
    }
    optimizer = torch.optim.SGD([p for layer in layers.values() for p in (layer.B, layer.A)])
    stagnate(make_allocator(layers), layers, optimizer)
    assert {name: layer.active_rank() for name, layer in layers.items()} == {"many": 5, "few": 3}


@pytest.mark.parametrize(("count", "growing"), [(1, 1), (10, 1), (11, 2), (20, 2)])
def test_a_tenth_of_the_layers_grows_at_once(count, growing):
    layers = {str(n): cut_layer(2) for n in range(count)}
    optimizer = torch.optim.SGD([p for layer in layers.values() for p in (layer.B, layer.A)])
    assert stagnate(make_allocator(layers), layers, optimizer)[-1]["rank/grown"] == growing


def test_growth_never_exceeds_max_rank():
    layer = cut_layer(4, max_rank=5)
    allocator = make_allocator({"l": layer}, grow_by=3)
    logs = stagnate(allocator, {"l": layer}, adamw(layer), evaluations=9)
    assert [log.get("rank/grown") for log in logs if log] == [1.0]
    assert layer.active_rank() == 5


def test_no_growth_when_switched_off():
    layer = cut_layer(4)
    allocator = make_allocator({"l": layer}, grow_by=0)
    assert not any(stagnate(allocator, {"l": layer}, adamw(layer), evaluations=9))


def test_patience_counts_evaluations_without_a_new_lowest_loss():
    layer = cut_layer(2)
    allocator, optimizer = make_allocator({"l": layer}, patience=3), adamw(layer)
    losses = [5.0, 4.0, 4.0, 4.5, 3.9, math.nan, 3.9, math.inf, 3.95, 3.95, 3.8, 9.0, 9.0, 9.0]
    grown = [
        bool(allocator.after_evaluation({"l": layer}, optimizer, 500, loss)) for loss in losses
    ]
    # The third after 3.9; then three more are wanted, and 3.8 comes first; then the third after it.
    assert [n for n, g in enumerate(grown) if g] == [7, 13]
    layer = cut_layer(2)
    allocator = make_allocator({"l": layer}, patience=1)
    assert allocator.after_evaluation({"l": layer}, adamw(layer), 500, math.nan)


def test_no_growth_outside_the_window():
    layer = cut_layer(2)
    allocator = make_allocator({"l": layer}, total_steps=100, window=(0.2, 0.7), patience=1)
    optimizer, grown = adamw(layer), []
    for step in range(1, 101):
        if allocator.after_evaluation({"l": layer}, optimizer, step, 1.0):
            grown.append(step)
    assert grown == list(range(20, 28))  # from the window on, until max_rank
    layer = cut_layer(2)
    allocator.evaluations_without_improvement = 9
    assert not allocator.after_evaluation({"l": layer}, adamw(layer), 71, 1.0)
    assert allocator.after_evaluation({"l": layer}, adamw(layer), 70, 1.0)


def test_a_grown_layer_is_left_alone_by_two_svds():
    layer = cut_layer(4, spectrum=[1.0, 0.9, 0.01, 0.009])
    other = cut_layer(4, spectrum=[1.0, 0.9, 0.8, 0.7], removed=2)
    layers = {"l": layer, "other": other}
    optimizer = torch.optim.SGD([p for each in layers.values() for p in (each.B, each.A)])
    allocator = make_allocator(layers, interval=10)
    stagnate(allocator, layers, optimizer)
    assert (layer.active_rank(), layer.cuts, other.cuts) == (5, 1, 1)
    ranks = []
    for step in range(501, 541):
        if allocator.after_step(layers, optimizer, step):
            ranks.append((step, layer.active_rank(), int(layer.cuts), int(other.cuts)))
    assert ranks == [(510, 5, 1, 2), (520, 5, 1, 3), (530, 2, 2, 4), (540, 2, 3, 5)]


# ---- budget --------------------------------------------------------------------------------------


def test_budget_raises_one_epsilon_for_all_until_the_parameters_fit():
    for seed in range(5):
        layers = {
            f"l{n}": make_layer(o, i, rank, seed=seed + 10 * n, min_rank=min(2, rank))
            for n, (o, i, rank) in enumerate(SHAPES)
        }
        cost = {path: sum(layer.store.shape) for path, layer in layers.items()}
        factors = {path: arrays(layer) for path, layer in layers.items()}

        def parameters(epsilon, layers=layers, cost=cost, factors=factors):
            return sum(
                cost[p] * oracle_rank(*factors[p], epsilon, layers[p].min_rank) for p in layers
            )

        optimizer = torch.optim.SGD([p for layer in layers.values() for p in (layer.B, layer.A)])
        least = sum(cost[path] * layer.min_rank for path, layer in layers.items())
        budget = (least + parameters(0.01)) // 2
        allocator = make_allocator(layers, budget=budget)
        log = allocator.after_step(layers, optimizer, 1)
        epsilon = log["rank/epsilon"]
        assert {p: layer.active_rank() for p, layer in layers.items()} == {
            p: oracle_rank(*factors[p], epsilon, layers[p].min_rank) for p in layers
        }
        assert parameters(epsilon) <= budget < parameters(epsilon - 1e-9)
        # The bound of the given epsilon is exceeded, and said to be.
        over = {
            p: log[f"rank/discarded_energy/{p}"]
            for p in layers
            if f"rank/discarded_energy/{p}" in log
        }
        assert over and all(0.01 < value <= max(epsilon, 0.999) for value in over.values())
        assert max(over.values()) == log["rank/discarded_energy_max"]


def test_a_loose_budget_leaves_epsilon_and_a_tight_one_leaves_min_rank():
    for budget, k in ((7 * 16, 4), (2 * 16, 2)):
        layer = make_layer(9, 7, 4, max_rank=7, min_rank=2, spectrum=[1.0, 0.9, 0.8, 0.7])
        allocator = make_allocator({"l": layer}, budget=min(budget, 7 * 16 - 1))
        log = allocator.after_step({"l": layer}, adamw(layer), 1)
        assert layer.active_rank() == k
        assert (log["rank/epsilon"] == 0.01) == (k == 4)


def test_layers_that_an_svd_skips_count_in_the_budget():
    layers = {path: make_layer(9, 7, 4, spectrum=[1.0, 0.9, 0.8, 0.7]) for path in "ab"}
    layers["a"].svds_to_skip.fill_(1)
    optimizer = torch.optim.SGD([p for layer in layers.values() for p in (layer.B, layer.A)])
    make_allocator(layers, budget=6 * 16).after_step(layers, optimizer, 1)
    assert [layer.active_rank() for layer in layers.values()] == [4, 2]


def test_growth_stops_at_the_budget():
    layer = cut_layer(4)  # 27 parameters a direction
    allocator = make_allocator({"l": layer}, budget=6 * 27 + 26, patience=1)
    logs = stagnate(allocator, {"l": layer}, adamw(layer), evaluations=9)
    assert sum(bool(log) for log in logs) == 2 and layer.active_rank() == 6


# ---- a whole run ---------------------------------------------------------------------------------


class Toy:
    """Regression onto a rank-3 change of two frozen layers; growth driven by the training loss."""

    def __init__(self, steps=120, **options):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, 14, generator=generator)
        self.layers: dict[str, AdapterLinear] = {}
        self.targets = {}
        ranks = options.pop("ranks", {"rank": 6, "min_rank": 1})
        for path in ("first", "second"):
            W = torch.randn(10, 14, generator=generator)
            change = torch.randn(10, 3, generator=generator) @ torch.randn(
                3, 14, generator=generator
            )
            self.layers[path] = AdaLoraLinear(
                DenseStore(W), None, path=path, seed=0, alpha=6.0, **ranks
            )
            self.targets[path] = self.x @ (W + change / 4).T
        parameters = [p for layer in self.layers.values() for p in layer.roles().values()]
        self.optimizer = torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.01)
        self.allocator = EnergyAllocator(
            self.layers, total_steps=steps, seed=0, **{"interval": 6, "patience": 1, **options}
        )
        self.steps = steps
        self.jumps: list[tuple[int, float, float, float]] = []
        self.losses: list[float] = []

    def loss(self) -> Tensor:
        errors = [layer(self.x) - self.targets[path] for path, layer in self.layers.items()]
        return torch.stack([error.square().sum() for error in errors]).sum()

    def train(self, first=1, last=None):
        for step in range(first, (last or self.steps) + 1):
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            self.losses.append(loss.item())
            self.optimizer.step()
            before = self.loss().item()
            norm = sum(layer.delta_weight().norm().item() ** 2 for layer in self.layers.values())
            if after_step(self.layers, self.optimizer, step, self.allocator):
                self.jumps.append((step, before, self.loss().item(), norm**0.5))
            if step % 10 == 0:  # a signal with two plateaus
                signal = 1.0 if step < 60 else 0.5
                self.allocator.after_evaluation(self.layers, self.optimizer, step, signal)
        return self

    def state(self):
        return (
            {path: layer.adapter_state() for path, layer in self.layers.items()},
            self.optimizer.state_dict(),
            json.loads(json.dumps(self.allocator.state_dict(), allow_nan=False)),
        )


def test_training_goes_on_through_cuts_and_the_jump_is_bounded():
    epsilon = 1e-3
    toy = Toy(epsilon=epsilon).train()
    ranks = [layer.active_rank() for layer in toy.layers.values()]
    assert all(layer.cuts > 0 for layer in toy.layers.values())
    assert min(ranks) >= 3 and max(ranks) <= 5  # the target has 3, the start 6
    assert len(toy.jumps) >= 8 and toy.losses[-1] < 1e-4 * toy.losses[0]
    # | sqrt(loss after) - sqrt(loss before) | <= ||x||_2 sqrt(epsilon) ||s B A||_F
    gain = torch.linalg.matrix_norm(toy.x, 2).item() * epsilon**0.5
    for _, before, after, norm in toy.jumps:
        assert abs(after**0.5 - before**0.5) <= gain * norm * (1 + 1e-4)


def test_rebuild_only_trains_without_jumps():
    toy = Toy(epsilon=0.0, ranks={"rank": 6, "min_rank": 6}).train()
    assert [layer.active_rank() for layer in toy.layers.values()] == [6, 6]
    assert len(toy.jumps) == 11
    for _, before, after, _ in toy.jumps:
        assert after == pytest.approx(before, rel=1e-3, abs=1e-3)
    # No step after a rebuild sends the loss up: the moments fit the new factors.
    worst = max(b / a for a, b in zip(toy.losses[1:], toy.losses[2:], strict=False))
    plain = Toy(epsilon=0.0, ranks={"rank": 6, "min_rank": 6}, window=(0.95, 1.0)).train()
    worst_plain = max(b / a for a, b in zip(plain.losses[1:], plain.losses[2:], strict=False))
    assert worst <= worst_plain + 0.1


@pytest.mark.parametrize("moments", ["transport", "reset"])
def test_a_resumed_run_is_the_uninterrupted_one(moments):
    whole = Toy(moments=moments).train()
    assert sum(int(layer.drawn) for layer in whole.layers.values()) > 0  # it grew
    for stop in (47, 70):
        adapters, optimizer, allocator = Toy(moments=moments).train(last=stop).state()
        resumed = Toy(moments=moments)
        for path, layer in resumed.layers.items():
            layer.load_adapter_state(adapters[path])
        resumed.optimizer.load_state_dict(optimizer)
        resumed.allocator.load_state_dict(allocator)
        resumed.train(first=stop + 1)
        for path, layer in whole.layers.items():
            state = resumed.layers[path].adapter_state()
            assert state.keys() == layer.adapter_state().keys() >= {"A", "B", "k", "svds_to_skip"}
            assert all(torch.equal(state[key], t) for key, t in layer.adapter_state().items())
            assert resumed.layers[path].active_rank() == layer.active_rank()
        assert resumed.allocator.state_dict() == whole.allocator.state_dict()
        assert resumed.losses == whole.losses[stop:]


# ---- configuration and errors --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 1.0}, r"epsilon is 1\.0; it must lie in \[0, 1\)"),
        ({"epsilon": -0.1}, r"epsilon is -0\.1"),
        ({"epsilon": math.nan}, r"epsilon is nan"),
        ({"interval": 0}, r"interval is 0; it must be at least 1 step"),
        ({"window": (0.7, 0.2)}, r"window is .0\.7, 0\.2.; it must be two fractions"),
        ({"window": (-0.1, 0.5)}, r"window is"),
        ({"window": (0.2, 1.1)}, r"window is"),
        ({"window": (0.2,)}, r"window is"),
        ({"window": (20, 70)}, r"window is"),
        ({"interval": 60}, r"interval is 60, and no multiple of it lies in .* 20 to 50 of 100"),
        ({"total_steps": 0}, r"no multiple of it lies"),
        ({"patience": 0}, r"patience is 0; it must be at least 1 evaluation"),
        ({"grow_by": -1}, r"grow_by is -1"),
        ({"grow_layers": 0}, r"grow_layers is 0"),
        ({"moments": "keep"}, r"moments is 'keep'; it must be 'transport' or 'reset'"),
        ({"budget": 15}, r"budget is 15 parameters; it must be at least 16"),
        ({"budget": 64}, r"budget is 64 parameters.*below 64"),
    ],
)
def test_bad_settings_are_one_sentence(options, message):
    layers = {"l": make_layer(9, 7, 4)}
    defaults = {"total_steps": 100, "seed": 0, "interval": 10, "window": (0.2, 0.5)}
    EnergyAllocator(layers, **defaults)
    with pytest.raises(ValueError, match=message) as caught:
        EnergyAllocator(layers, **{**defaults, **options})
    assert str(caught.value).count(". ") == 0


def test_layers_of_another_kind_are_refused():
    class Other(LowRankLinear):
        def factors(self):
            return torch.zeros(3, 1), torch.zeros(1, 4)

    other = Other(DenseStore(torch.zeros(3, 4)), None, path="x", seed=0)
    with pytest.raises(ValueError, match="AdaLoraLinear only; found"):
        make_allocator({"l": make_layer(), "x": other})
    with pytest.raises(ValueError, match="no layer at all"):
        make_allocator({})


def test_the_configuration_names_every_option_once():
    path = Path(__file__).parent.parent / "conf" / "variant" / "adalora.yaml"
    conf = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    options = {name: v for name, v in conf["allocator"].items() if not name.startswith("_")}
    parameters = inspect.signature(EnergyAllocator).parameters
    assert set(options) == set(parameters) - {"layers", "total_steps", "seed"}
    for name, value in options.items():
        default = parameters[name].default
        assert value == (list(default) if isinstance(default, tuple) else default)
    adapter = {name for name in conf["adapter"] if not name.startswith("_")}
    assert adapter <= set(inspect.signature(AdaLoraLinear).parameters)


def test_parameters_in_use_fall_with_the_rank():
    layer = make_layer(9, 7, 4)
    held = layer.active_parameters()
    assert held == 4 * (9 + 7)
    layer.activate(1)
    assert layer.active_parameters() == 9 + 7
