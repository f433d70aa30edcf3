"""AdaLoRA as published: against loops in numpy float64, and against peft step by step."""

import copy
import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from variants import DenseStore, Variant, after_step
from variants.adalora_budget import AdaLoraBudgetLinear, BudgetAllocator, mask_to_budget
from variants.lora import LoraLinear

ROLES = ("A", "B", "E")
SHAPES = {"first": (7, 5), "second": (6, 7), "third": (3, 6)}  # (o, i), a chain
RANK = {"first": 4, "second": 5, "third": 3}
TOTAL = sum(RANK.values())  # b_0 = 12


def disturb(module: nn.Module, seed: int, std: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(std * noise)


def make_layer(path: str = "first", *, disturbed: bool = True, **options) -> AdaLoraBudgetLinear:
    o, i = SHAPES[path]
    generator = torch.Generator().manual_seed(1)
    layer = AdaLoraBudgetLinear(
        DenseStore(torch.randn(o, i, generator=generator)),
        torch.randn(o, generator=generator),
        **{"path": path, "seed": 3, "rank": RANK[path], "alpha": 6.0, **options},
    )
    if disturbed:
        disturb(layer, seed=2)
    return layer.double()


def make_layers(**options) -> dict[str, AdaLoraBudgetLinear]:
    return {path: make_layer(path, **options) for path in SHAPES}


def make_allocator(layers, **options) -> BudgetAllocator:
    """b_0 = 12, b_T = 6, t_i = 3, T - t_f = 15, T = 20."""
    settings = {"target_frac": 0.5, "initial_frac": 0.15, "final_frac": 0.25, "interval": 2}
    return BudgetAllocator(layers, **{"total_steps": 20, **settings, **options})


class Training:
    """A chain of layers under AdamW, the penalty and the hooks, one step at a time."""

    def __init__(self, layers, allocator=None, lr=0.05, gamma=0.1):
        self.layers, self.allocator = layers, allocator
        self.parameters = [p for layer in layers.values() for p in layer.roles().values()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.01)
        self.variant = Variant(
            name="adalora_budget",
            lr=lr,
            adapter=AdaLoraBudgetLinear,
            groups=lambda model, lr: [],
            penalty_weight=gamma,
        )
        self.done = 0

    def loss(self) -> Tensor:
        x, target = batch(self.done)
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return (x - target).square().mean()

    def step(self) -> dict[str, float]:
        (self.loss() + self.variant.penalty(self.layers)).backward()
        self.optimizer.step()
        self.done += 1
        logged = after_step(self.layers, self.optimizer, self.done, self.allocator)
        self.optimizer.zero_grad()
        return logged

    def state(self) -> dict:
        return {
            "layers": {name: layer.adapter_state() for name, layer in self.layers.items()},
            "optimizer": self.optimizer.state_dict(),
            "allocator": json.dumps(self.allocator.state_dict()),
            "done": self.done,
        }

    def load(self, state: dict) -> None:
        for name, layer in self.layers.items():
            layer.load_adapter_state(state["layers"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.allocator.load_state_dict(json.loads(state["allocator"]))
        self.done = state["done"]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)


def numpy_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64).copy()


# ---- the layer ----------------------------------------------------------------------------------


def test_definition_against_numpy():
    layer = make_layer()
    A, B, E = (numpy_of(getattr(layer, role)) for role in ROLES)
    W, bias = numpy_of(layer.store.weight), numpy_of(layer.bias)
    expected = W + 6.0 / 4 * sum(E[k] * np.outer(B[:, k], A[k]) for k in range(4))
    x = np.random.default_rng(0).normal(size=(2, 3, 5))
    np.testing.assert_allclose(layer(torch.tensor(x)).detach(), x @ expected.T + bias, atol=1e-12)
    np.testing.assert_allclose(layer.float().delta_weight(), expected - W, atol=1e-5)


def test_initial_values():
    big = {"store": DenseStore(torch.zeros(300, 200)), "bias": None, "path": "p", "seed": 0}
    layer = AdaLoraBudgetLinear(**big, rank=16, alpha=8.0)
    assert layer.scale == 0.5
    assert not layer.E.any() and not layer.delta_weight().any()
    for role in "AB":
        factor = getattr(layer, role)
        assert factor.std().item() == pytest.approx(0.02, rel=0.05)
        assert factor.abs().max() > 0.05  # not uniform, whose bound is 0.035
    assert not torch.equal(layer.A[0, :64], layer.B[:64, 0])  # streams of their own
    small = AdaLoraBudgetLinear(**big, rank=8, alpha=8.0)
    assert torch.equal(small.A, layer.A[:8]) and torch.equal(small.B, layer.B[:, :8])
    assert set(layer.roles()) == {"A", "B", "E"}
    assert layer.active_rank() == 16


@pytest.mark.parametrize("regularizer", ["code", "paper"])
def test_penalty(regularizer):
    layer = make_layer(regularizer=regularizer)
    A, B = numpy_of(layer.A), numpy_of(layer.B)
    errors = []
    for gram in (B.T @ B, A @ A.T):
        squares = 0.0
        for row in range(4):
            for column in range(4):
                squares += (gram[row, column] - (row == column)) ** 2
        errors.append(squares)
    expected = sum(errors) if regularizer == "paper" else np.sqrt(errors).mean()
    assert layer.penalty().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("regularizer", ["code", "paper"])
def test_penalty_of_orthonormal_factors_has_a_finite_gradient(regularizer):
    layer = make_layer(regularizer=regularizer)
    with torch.no_grad():
        layer.A.copy_(torch.eye(4, 5))
        layer.B.copy_(torch.eye(7, 4))
    penalty = layer.penalty()
    penalty.backward()
    assert penalty.item() == 0.0
    assert not layer.A.grad.any() and not layer.B.grad.any()  # NaN is truthy


def test_importance_and_score_against_loops():
    layers = make_layers(beta1=0.85, beta2=0.7)
    training = Training(layers)
    sensitivity = {(n, r): np.zeros(getattr(layers[n], r).shape) for n in layers for r in ROLES}
    uncertainty = copy.deepcopy(sensitivity)
    seen = {}

    def remember_gradients(*_):
        seen.update({(n, r): numpy_of(getattr(layers[n], r).grad) for n in layers for r in ROLES})

    training.optimizer.register_step_post_hook(remember_gradients)
    for _ in range(4):
        training.step()
        for (name, role), gradient in seen.items():
            new = numpy_of(getattr(layers[name], role))  # after the optimiser step
            for index in np.ndindex(new.shape):
                importance = abs(new[index] * gradient[index])
                smoothed = 0.85 * sensitivity[name, role][index] + 0.15 * importance
                sensitivity[name, role][index] = smoothed
                deviation = abs(importance - smoothed)  # from the updated mean
                uncertainty[name, role][index] *= 0.7
                uncertainty[name, role][index] += 0.3 * deviation
    for name, layer in layers.items():
        for role in ROLES:
            for kind, expected in (("sensitivity", sensitivity), ("uncertainty", uncertainty)):
                actual = getattr(layer, f"{kind}_{role}")
                np.testing.assert_allclose(actual, expected[name, role], rtol=1e-9)
        element = {role: sensitivity[name, role] * uncertainty[name, role] for role in ROLES}
        o, i = SHAPES[name]
        expected_score = [
            element["E"][k]
            + sum(element["A"][k, j] for j in range(i)) / i
            + sum(element["B"][j, k] for j in range(o)) / o
            for k in range(RANK[name])
        ]
        np.testing.assert_allclose(layer.score(), expected_score, rtol=1e-9)


# ---- the schedule -------------------------------------------------------------------------------


def make_paper_allocator() -> BudgetAllocator:
    """72 matrices of rank 12, as in the paper: b_0 = 864, b_T = 576, T = 1000."""
    layers = {}
    for index in range(72):
        store = DenseStore(torch.zeros(12, 12))
        layers[str(index)] = AdaLoraBudgetLinear(
            store, None, path=str(index), seed=0, rank=12, alpha=1.0
        )
    return BudgetAllocator(
        layers, total_steps=1000, target_frac=0.6666667, initial_frac=0.1, final_frac=0.3
    )


def test_schedule_is_the_codes_and_not_the_printed_one():
    budget = make_paper_allocator().budget

    def printed(t, total=1000, initial=100, final=300):
        share = 1 - (t - initial - final) / (total - initial - final)
        return int(576 + (864 - 576) * share**3)

    assert (printed(100), printed(700)) == (1548, 612)
    assert (budget(100), budget(700)) == (864, 576)
    for t in range(0, 1001):
        share = min(max((700 - t) / 600, 0), 1)
        assert abs(budget(t) - (576 + 288 * share**3)) < 1 + 1e-9
    values = [budget(t) for t in range(1001)]
    assert values[:101] == [864] * 101 and values[700:] == [576] * 301
    assert all(later <= earlier for earlier, later in pairwise(values))
    assert budget(400) == 576 + 288 // 8


@pytest.mark.parametrize(
    ("interval", "expected_at", "first_budget"),
    [
        (1, [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], 10),
        (2, [4, 6, 8, 10, 12, 14, 16], 10),  # 16: the pattern of the final phase
        (3, [6, 9, 12, 15, 16], 8),  # not 3 = t_i
        (7, [7, 14, 16], 7),
    ],
)
def test_masks_are_made_on_schedule_and_keep_the_budget(interval, expected_at, first_budget):
    layers = make_layers()
    training = Training(layers, make_allocator(layers, interval=interval))
    masked_at, budgets = [], []
    for step in range(1, 21):
        logged = training.step()
        if logged:
            masked_at.append(step)
            budgets.append(logged["rank/budget"])
            assert logged["rank/mean"] == logged["rank/budget"] / 3
            assert sum(layer.active_rank() for layer in layers.values()) == logged["rank/budget"]
            for layer in layers.values():
                assert torch.equal(layer.E != 0, layer.kept)
        share = min(max((15 - step) / 12, 0), 1)
        assert training.allocator.budget(step) == int(6 + 6 * share**3)
    assert masked_at == expected_at
    assert budgets[0] == first_budget and budgets[-1] == 6
    assert budgets == sorted(budgets, reverse=True)


@pytest.mark.parametrize("budget", [0, 1, 5, 8, TOTAL])
def test_ties_keep_the_first_and_the_count_is_exact(budget):
    layers = make_layers()
    for layer in layers.values():  # all scores are equal: zero
        assert not layer.score().any()
    with torch.no_grad():  # but for the third layer's, which is best
        layers["third"].sensitivity_E.fill_(2.0)
        layers["third"].uncertainty_E.fill_(2.0)
    mask_to_budget(layers, budget)
    ranks = [layer.active_rank() for layer in layers.values()]
    rest = max(budget - 3, 0)
    assert ranks == [min(rest, 4), max(rest - 4, 0), min(budget, 3)]
    for layer, rank in zip(layers.values(), ranks, strict=True):
        assert layer.kept.tolist() == [k < rank for k in range(len(layer.kept))]


def test_a_target_of_everything_keeps_everything():
    layers = make_layers()
    training = Training(layers, make_allocator(layers, target_frac=1.0))
    for _ in range(20):
        training.step()
    assert all(layer.kept.all() and (layer.E != 0).all() for layer in layers.values())


def test_masks_touch_E_alone_and_triplets_return():
    layers = make_layers()
    allocator = make_allocator(layers)
    training = Training(layers, allocator)
    plain = Training(copy.deepcopy(layers))  # the same, never masked
    for _ in range(3):
        training.step(), plain.step()
    before = {name: layer.E.detach().clone() for name, layer in plain.layers.items()}
    training.step(), plain.step()  # the first mask
    for name, layer in layers.items():
        twin = plain.layers[name]
        assert torch.equal(layer.A, twin.A) and torch.equal(layer.B, twin.B)
        assert torch.equal(layer.E, twin.E * layer.kept)
        for role in ROLES:
            moments = training.optimizer.state[getattr(layer, role)]
            for key, value in plain.optimizer.state[getattr(twin, role)].items():
                assert torch.equal(moments[key], value), (role, key)
            assert not torch.equal(twin.E, before[name])
    masked = {name: ~layer.kept.clone() for name, layer in layers.items()}
    assert sum(int(mask.sum()) for mask in masked.values()) == 12 - 10
    training.step()  # step 5: no mask
    for name, layer in layers.items():
        assert (layer.E[masked[name]] != 0).all()
        for statistic in (layer.sensitivity_E, layer.uncertainty_E):
            statistic[masked[name]] += 10.0  # what was masked becomes the most important
    training.step()  # step 6: a mask
    for name, layer in layers.items():
        assert layer.kept[masked[name]].all() and (layer.E[masked[name]] != 0).all()


def test_final_phase_freezes_pattern_and_importances():
    layers = make_layers()
    training = Training(layers, make_allocator(layers))
    for _ in range(14):
        training.step()
    frozen = {
        name: {k: v.clone() for k, v in layer.state_dict().items() if "sensitivity" in k}
        for name, layer in layers.items()
    }
    scores = torch.cat([layer.score() for layer in layers.values()]).numpy()
    best = set(np.argsort(-scores)[:6])
    for step in range(15, 21):
        factors = {name: layer.A.detach().clone() for name, layer in layers.items()}
        training.step()
        for name, layer in layers.items():
            assert not torch.equal(layer.A, factors[name])  # still trained
            for key, value in frozen[name].items():
                assert torch.equal(layer.state_dict()[key], value)
        if step > 15:
            kept = torch.cat([layer.kept for layer in layers.values()])
            assert set(kept.nonzero().flatten().tolist()) == best
            for layer in layers.values():
                assert torch.equal(layer.E != 0, layer.kept)


def test_layer_hook_runs_before_the_allocator():
    """A mask at the first step that has importances ranks by that step's own importances."""
    layers = make_layers()
    training = Training(layers, make_allocator(layers, initial_frac=0.0, interval=1))
    training.step()
    assert sum(layer.active_rank() for layer in layers.values()) < TOTAL
    kept = torch.cat([layer.kept for layer in layers.values()])
    scores = torch.cat([layer.score() for layer in layers.values()])
    assert scores[kept].min() > scores[~kept].max() > 0


@pytest.mark.parametrize("saved_at", [2, 3, 7, 8, 14, 15, 16, 18])
def test_saved_and_loaded_continues_identically(saved_at):
    layers = make_layers()
    whole = Training(layers, make_allocator(layers))
    for _ in range(saved_at):
        whole.step()
    state = copy.deepcopy(whole.state())
    fresh = make_layers(disturbed=False)
    for name, layer in fresh.items():  # the base is not part of the adapter's state
        layer.store, layer.bias = layers[name].store, layers[name].bias
    resumed = Training(fresh, make_allocator(fresh))
    resumed.load(state)
    for name, layer in layers.items():
        assert fresh[name].active_rank() == layer.active_rank() == int(layer.kept.sum())
    for _ in range(saved_at, 20):
        assert whole.step() == resumed.step()
    for name, layer in layers.items():
        for key, value in layer.adapter_state().items():
            assert torch.equal(fresh[name].adapter_state()[key], value), (name, key)


def test_gradients_that_are_gone_are_told():
    layers = make_layers()
    with pytest.raises(AssertionError, match="no layer has a gradient; call after_step before"):
        make_allocator(layers).after_step(layers, None, 1)


def test_a_layer_that_no_token_reaches_loses_importance():
    """As with gradients of 0: the averages fall by beta, towards 0."""
    layer, other = make_layer(), make_layer()
    for each in (layer, other):
        for role in "ABE":
            getattr(each, role).grad = torch.ones_like(getattr(each, role))
        each.after_step(1)
        for role in "ABE":
            parameter = getattr(each, role)
            parameter.grad = None if each is layer else torch.zeros_like(parameter)
        each.after_step(2)
    assert layer.score().any() and torch.equal(layer.score(), other.score())


def test_evaluations_change_nothing():
    layers = make_layers()
    training = Training(layers, make_allocator(layers))
    before = copy.deepcopy(training.state())
    assert training.allocator.after_evaluation(layers, training.optimizer, 5, 0.7) == {}
    assert str(training.state()) == str(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank is 0; first is 7 x 5, so it must lie in \[1, 5\]"),
        ({"rank": 6}, r"rank is 6; first is 7 x 5, so it must lie in \[1, 5\]"),
        ({"beta1": 1.0}, r"beta1 is 1.0; it must lie in \(0, 1\)"),
        ({"beta2": 0.0}, r"beta2 is 0.0; it must lie in \(0, 1\)"),
        ({"regularizer": "papers"}, "regularizer is 'papers'; it must be 'code' or 'paper'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_layer_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make_layer(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_frac": 0.0}, "target_frac is 0.0; .* one of the 12 allocated ranks"),
        ({"target_frac": -0.5}, "target_frac is -0.5"),
        ({"target_frac": 0.04}, "target_frac is 0.04"),
        ({"target_frac": 1.5}, "target_frac is 1.5"),
        ({"initial_frac": -0.1}, r"initial_frac is -0.1; it must lie in \[0, 1\)"),
        ({"final_frac": 1.0}, r"final_frac is 1.0; it must lie in \[0, 1\)"),
        ({"initial_frac": 0.75}, "leave no step of 20 in which the budget could fall"),
        ({"total_steps": 1}, "leave no step of 1 in which"),
        ({"interval": 0}, "interval is 0; it must be at least 1 step"),
        ({"interval": 16}, "interval is 16, and no multiple of it lies in steps 4 to 15"),
    ],
)
def test_allocator_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make_allocator(make_layers(), **options)


def test_allocator_refuses_other_layers():
    lora = LoraLinear(DenseStore(torch.zeros(3, 4)), None, path="p", seed=0, rank=2, alpha=1.0)
    with pytest.raises(ValueError, match=r"only; found \['AdaLoraBudgetLinear', 'LoraLinear'\]"):
        make_allocator({"p": lora, **make_layers()})
    with pytest.raises(ValueError, match="found no layer at all"):
        make_allocator({})


# ---- peft ---------------------------------------------------------------------------------------


class Chain(nn.Module):
    """The layers of `Training` as nn.Linear, returning what peft adds the penalty to."""

    def __init__(self):
        super().__init__()
        for name, (o, i) in SHAPES.items():
            self.add_module(name, nn.Linear(i, o))

    def forward(self, x, target):
        for layer in self.children():
            x = torch.tanh(layer(x))
        return SimpleNamespace(loss=(x - target).square().mean(), logits=x)


def make_pair(rank: int = 3, gamma: float = 0.3):
    """(peft's model, our training) with the same disturbed state. T = 20, t_i = 3, T - t_f = 14."""
    from peft import AdaLoraConfig, get_peft_model

    base = Chain().double()
    disturb(base, seed=4)
    layers = {}
    for name in SHAPES:
        linear = getattr(base, name)
        store, bias = DenseStore(linear.weight.detach().clone()), linear.bias.detach().clone()
        layer = AdaLoraBudgetLinear(store, bias, path=name, seed=0, rank=rank, alpha=5.0).double()
        with torch.no_grad():
            for seed, role in enumerate(ROLES):
                generator = torch.Generator().manual_seed(10 * seed + len(name))
                factor = getattr(layer, role)
                factor.copy_(0.5 * torch.randn(factor.shape, generator=generator))
        layers[name] = layer
    config = AdaLoraConfig(
        init_r=rank,
        target_r=2,
        lora_alpha=5.0,
        tinit=3,
        tfinal=6,
        deltaT=2,
        total_step=20,
        orth_reg_weight=gamma,
        target_modules=list(SHAPES),
    )
    model = get_peft_model(base, config).double()
    with torch.no_grad():
        for name, layer in layers.items():
            theirs = getattr(model.base_model.model, name)
            theirs.scaling["default"] = 5.0 * (rank + 1e-5) / rank  # undo the epsilon
            theirs.lora_A["default"].copy_(layer.A)
            theirs.lora_B["default"].copy_(layer.B)
            theirs.lora_E["default"].copy_(layer.E[:, None])
    return model, Training(layers, lr=0.02, gamma=gamma)


def factors_of_peft(model) -> dict[tuple[str, str], Tensor]:
    return {
        (name, role): getattr(getattr(model.base_model.model, name), f"lora_{role}")["default"]
        for name in SHAPES
        for role in ROLES
    }


def assert_same(model, training: Training, *, gradients: bool = False, rtol: float = 1e-9) -> None:
    for (name, role), theirs in factors_of_peft(model).items():
        ours = getattr(training.layers[name], role)
        if gradients:
            ours, theirs = ours.grad, theirs.grad
        torch.testing.assert_close(
            ours, theirs.detach().reshape(ours.shape), rtol=rtol, atol=rtol, msg=f"{name} {role}"
        )


def test_peft_forward_and_gradients_with_penalty():
    model, training = make_pair()
    x, target = batch(0)
    output = model.base_model(x=x, target=target)  # PeftModel itself would skip the penalty here
    task = training.loss()
    loss = task + training.variant.penalty(training.layers)
    assert task.item() == pytest.approx((output.logits - target).square().mean().item(), rel=1e-12)
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-12)
    assert loss.item() > task.item() + 0.1
    output.loss.backward()
    loss.backward()
    assert_same(model, training, gradients=True)


def test_peft_twenty_adamw_steps_without_allocation():
    model, training = make_pair()
    optimizer = torch.optim.AdamW(factors_of_peft(model).values(), lr=0.02, weight_decay=0.01)
    for step in range(20):
        x, target = batch(step)
        model.base_model(x=x, target=target).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        training.step()
        assert_same(model, training, rtol=1e-7)


def test_peft_twenty_steps_with_allocation():
    """Through all three phases, to the end.

    What differs is set aside: peft always masks at T - t_f, so T - t_f is a multiple of the
    interval here; it fails at b_T = b_0, prunes ties, and forgets its importances afterwards.
    """
    model, training = make_pair()
    training.allocator = BudgetAllocator(
        training.layers,
        total_steps=20,
        target_frac=2 / 3,
        initial_frac=0.15,
        final_frac=0.3,
        interval=2,
    )
    optimizer = torch.optim.AdamW(factors_of_peft(model).values(), lr=0.02, weight_decay=0.01)
    for step in range(1, 21):
        x, target = batch(step - 1)
        model.base_model(x=x, target=target).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        training.step()
        assert_same(model, training, rtol=1e-7)
        pattern = model.base_model.peft_config["default"].rank_pattern or {}
        for name, kept in pattern.items():
            layer = training.layers[name.split(".lora_E")[0].split(".")[-1]]
            assert layer.kept.tolist() == kept
    assert len(pattern) == 3
    assert sum(layer.active_rank() for layer in training.layers.values()) == 6
