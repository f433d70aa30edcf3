"""A method whose hooks were not called, or did nothing, is no result; nor is one that trained more
than it says."""

import functools

import pytest
import torch
from command import CommandLine

import harness.loop.step
import variants
from harness.loop.laws import BrokenLaw, HookCounter, check_gradients

BUDGET = ["variant=adalora_budget"]
ENERGY = ["variant=adalora", "variant.allocator.interval=1"]


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def broken(cli, *overrides: str) -> str:
    """Returns the reason why a run failed, which its result says too."""
    assert cli(*overrides) == 1, cli.out
    result = cli.result()
    assert result["status"] == "failed" and result["failure"] == "BrokenLaw"
    assert cli.err == f"error: {result['reason']}\n"
    return result["reason"]


def nothing(*_) -> dict:
    return {}


def test_layers_that_are_not_told_of_a_step(cli, monkeypatch):
    def allocator_alone(layers, optimizer, step, allocator=None):
        return allocator.after_step(layers, optimizer, step)

    monkeypatch.setattr(variants, "after_step", allocator_alone)
    assert " was called 0 times in this run instead of 8." in broken(cli, *ENERGY)


def test_an_allocator_that_is_not_told_of_one_step(cli, monkeypatch):
    real = variants.after_step

    def all_but_one(layers, optimizer, step, allocator=None):
        return real(layers, optimizer, step, None if step == 5 else allocator)

    monkeypatch.setattr(variants, "after_step", all_but_one)
    assert broken(cli, *BUDGET) == (
        "after_step of the allocator was called 7 times in this run instead of 8."
    )


@pytest.mark.parametrize(
    ("allocator", "overrides", "said"),
    [
        (variants.EnergyAllocator, ENERGY, "ranks were cut 0 times instead of 4."),
        (variants.BudgetAllocator, BUDGET, "triplets are left instead of the"),
    ],
)
def test_ranks_that_were_never_decided(cli, monkeypatch, allocator, overrides, said):
    monkeypatch.setattr(allocator, "after_step", nothing)
    assert said in broken(cli, *overrides)


def test_a_penalty_that_is_left_out(cli, monkeypatch):
    monkeypatch.setattr(variants.Variant, "penalty", lambda *_: torch.zeros((), requires_grad=True))
    assert broken(cli, *BUDGET, "train.accumulation=2").startswith("penalty of bert.")


def test_skipped_steps_are_not_missed(cli, monkeypatch):
    """Neither hook is due after a step that the optimiser did not take."""
    real = harness.loop.step.training_step

    def poisoned(step, *, loss, **arguments):
        factor = float("nan") if step in (3, 5) else 1.0
        return real(step, loss=lambda *given: loss(*given) * factor, **arguments)

    monkeypatch.setattr(harness.loop.step, "training_step", poisoned)
    for overrides in (ENERGY, BUDGET):
        assert cli(*overrides, "train.on_nonfinite=skip") == 0, cli.err


def test_evaluations_are_counted():
    class Allocator:
        def after_step(self, *_): ...

        def after_evaluation(self, *_): ...

        def unmet(self, *_):
            return ""

    allocator, variant = Allocator(), variants.Variant(name="x", lr=1.0, adapter=None, groups=None)
    counter = HookCounter({}, allocator)
    allocator.after_evaluation()
    check = functools.partial(counter.check, variant, taken=[], steps=0)
    check(evaluations=1)
    with pytest.raises(BrokenLaw, match="after_evaluation of the allocator was called 1 times"):
        check(evaluations=2)
    resumed = HookCounter({}, Allocator())
    resumed.load_state_dict(counter.state_dict())
    assert resumed.calls == counter.calls


# ---- gradients of what is frozen -----------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 8])
def test_a_frozen_weight_that_gets_a_gradient(cli, monkeypatch, step):
    real = harness.loop.step.training_step

    def leaking(number, *, model, **arguments):
        if number == step:
            model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
        return real(number, model=model, **arguments)

    monkeypatch.setattr(harness.loop.step, "training_step", leaking)
    said = broken(cli, "variant=lora")
    assert said == "the frozen weight bert.embeddings.word_embeddings.weight has a gradient."


def test_a_gradient_left_on_a_weight_that_is_frozen_again():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    model(torch.ones(4, 3)).sum().backward()
    check_gradients(model, optimizer)
    model[0].bias.grad = torch.zeros(5)
    with pytest.raises(BrokenLaw, match=r"the frozen weight 0\.bias has a gradient"):
        check_gradients(model, optimizer)
