"""From roles to optimiser groups: rates, decays, and that each parameter is stepped once."""

import functools
import math

import pytest
import torch
from torch import nn

from harness.loop.show import group_table
from variants import (
    DoraLinear,
    FixedLinear,
    FullLinear,
    LoraLinear,
    Nf4Store,
    Variant,
    by_role,
    inject,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.query(x) + self.value(x))


class Model(nn.Module):
    """An embedding, three blocks and a head that is numbered inside."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.layer:
            x = block(x)
        return self.head(x.mean(1))


def adapted_model(
    adapter=LoraLinear,
    *,
    bias="none",
    head=("head",),
    train_modules=(),
    store=None,
    **options,
):
    model = Model()
    if adapter in (LoraLinear, DoraLinear):
        adapter = functools.partial(adapter, rank=2, alpha=4)
    variant = Variant(
        name="test",
        lr=1e-3,
        adapter=adapter,
        groups=by_role,
        bias=bias,
        **({"store": store} if store else {}),
    )
    if adapter is not FixedLinear or bias == "adapted":  # else targets would choose nothing
        options = {"targets": ["query", "value"], **options}
    inject(model, variant, seed=0, head=head, train_modules=train_modules, **options)
    return model


def rates(groups):
    """Role -> its only rate."""
    found = {group["name"]: group["lr"] for group in groups}
    assert len(found) == len(groups)
    return found


def rate_of(groups):
    """id of a parameter -> rate."""
    return {id(parameter): group["lr"] for group in groups for parameter in group["params"]}


def decay_of(groups):
    return {id(p): group["weight_decay"] for group in groups for p in group["params"]}


# ---- roles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [LoraLinear, DoraLinear, FullLinear, FixedLinear])
@pytest.mark.parametrize("bias", ["none", "adapted", "all"])
@pytest.mark.parametrize("more", [(), ("embedding",), ("layer.1.norm",)], ids=str)
@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.5, "norm_rates": 0.1}], ids=str)
def test_every_trainable_parameter_is_in_exactly_one_group(adapter, bias, more, options):
    model = adapted_model(adapter, bias=bias, train_modules=more)
    groups = by_role(model, lr=1e-3, **options)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    wanted = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(wanted)
    assert all(len(group["params"]) == len(group["modules"]) for group in groups)
    torch.optim.AdamW(groups, fused=True)


def test_each_parameter_has_a_declared_role():
    model = adapted_model(DoraLinear, bias="all", train_modules=("embedding",))
    groups = by_role(model, lr=1e-3)
    role = {id(p): group["name"] for group in groups for p in group["params"]}
    block = model.layer[1]
    assert role[id(block.query.A)] == "A"
    assert role[id(block.query.B)] == "B"
    assert role[id(block.query.m)] == "m"
    assert role[id(block.query.bias)] == "bias"
    assert role[id(block.norm.bias)] == "bias"
    assert role[id(model.embedding.weight)] == "embedding"
    assert {role[id(p)] for p in model.head.parameters()} == {"head"}
    assert {group["name"] for group in groups} == {"A", "B", "m", "bias", "embedding", "head"}


def test_only_fresh_modules_have_the_heads_rate_and_depth():
    model = adapted_model(head=("head.2",), train_modules=("head.0", "layer.0.norm"))
    groups = by_role(model, lr=1.0, layer_decay=0.5, module_rates={"head": 5e-3})
    role = {id(p): group["name"] for group in groups for p in group["params"]}
    found = rate_of(groups)
    assert role[id(model.head[2].weight)] == "head" and found[id(model.head[2].weight)] == 5e-3
    assert role[id(model.head[0].weight)] == "module"
    assert role[id(model.layer[0].norm.weight)] == "module"
    assert found[id(model.layer[0].norm.weight)] == 0.25


def test_a_rate_for_heads_serves_a_model_without_one():
    groups = by_role(adapted_model(head=()), lr=1e-3, module_rates={"head": 5e-3})
    assert {group["name"] for group in groups} == {"A", "B"}


def test_absolute_rates_are_marked():
    model = adapted_model(train_modules=("embedding",))
    groups = by_role(model, lr=1e-3, embedding_lr=1e-4, module_rates={"head": 1e-3, "*.0.query": 2})
    marked = {(group["name"], group["lr"]) for group in groups if group["absolute"]}
    assert marked == {("head", 1e-3), ("embedding", 1e-4), ("A", 2), ("B", 2)}


def test_the_groups_say_which_modules_they_hold():
    groups = by_role(adapted_model(targets=["value"]), lr=1e-3, weight_decay=0.0)
    modules = {group["name"]: group["modules"] for group in groups}
    assert modules["A"] == [f"layer.{n}.value" for n in range(3)]
    assert modules["head"] == ["head.0", "head.0", "head.2", "head.2"]  # weight and bias


# ---- rates --------------------------------------------------------------------------------------


def test_B_learns_at_a_multiple_of_As_rate_and_nothing_else_does():
    groups = by_role(
        adapted_model(DoraLinear, bias="adapted", train_modules=("embedding",)),
        lr=2e-3,
        ratios={"B": 16.0},
    )
    found = rates([group for group in groups if group["name"] != "head"])
    assert found.pop("B") == pytest.approx(32e-3)
    assert set(found) == {"A", "m", "bias", "embedding"} and set(found.values()) == {2e-3}


def test_the_opposite_claim_can_be_put_to_the_test():
    found = rates(by_role(adapted_model(), lr=1e-3, ratios={"A": 4, "head": 0.5}, weight_decay={}))
    assert found == pytest.approx({"A": 4e-3, "B": 1e-3, "head": 0.5e-3})


def test_a_first_step_of_adam_moves_B_as_many_times_as_far():
    model = adapted_model()
    with torch.no_grad():
        for block in model.layer:
            block.query.B.normal_()
            block.value.B.normal_()
    optimizer = torch.optim.AdamW(by_role(model, lr=1e-3, ratios={"B": 16.0}), weight_decay=0.0)
    layer = model.layer[0].query
    A, B = layer.A.detach().clone(), layer.B.detach().clone()
    model(torch.randint(0, 11, (4, 6))).square().sum().backward()
    assert layer.A.grad.abs().min() > 1e-6 and layer.B.grad.abs().min() > 1e-6
    optimizer.step()  # of the rate's size, in the gradient's sign
    torch.testing.assert_close(layer.A - A, -1e-3 * layer.A.grad.sign(), rtol=1e-2, atol=0)
    torch.testing.assert_close(layer.B - B, -16e-3 * layer.B.grad.sign(), rtol=1e-2, atol=0)


def test_embeddings_have_an_absolute_rate():
    model = adapted_model(train_modules=("embedding",))
    found = rates(by_role(model, lr=1e-3, embedding_lr=1e-6, ratios={"embedding": 8.0}))
    assert found["embedding"] == 1e-6 and found["A"] == 1e-3
    assert rates(by_role(model, lr=1e-3))["embedding"] == 1e-3


def test_rates_decay_with_depth_below_the_top():
    model = adapted_model(train_modules=("embedding", "layer.0.norm"))
    found = rate_of(by_role(model, lr=1.0, ratios={"B": 2.0}, layer_decay=0.5))
    for depth, expected in ((2, 1.0), (1, 0.5), (0, 0.25)):
        assert found[id(model.layer[depth].query.A)] == expected
        assert found[id(model.layer[depth].value.B)] == 2 * expected
    assert found[id(model.embedding.weight)] == 0.125
    assert {found[id(p)] for p in model.head.parameters()} == {1.0}  # whatever its own numbers


def test_the_top_is_the_models_and_not_that_of_the_adapted_layers():
    model = adapted_model(layers=[0, 1])
    found = rate_of(by_role(model, lr=1.0, layer_decay=0.5))
    assert found[id(model.layer[1].query.A)] == 0.5


def test_module_rates_are_absolute_and_the_last_match_wins():
    model = adapted_model(DoraLinear)
    groups = by_role(
        model,
        lr=1.0,
        ratios={"B": 16.0},
        layer_decay=0.5,
        norm_rates=3.0,
        module_rates={"head": 5e-3, "query": 0.1, "m": 0.2, "layer.1.*": 0.3},
    )
    found = rate_of(groups)
    assert {found[id(p)] for p in model.head.parameters()} == {5e-3}
    assert found[id(model.layer[0].query.A)] == found[id(model.layer[0].query.B)] == 0.1
    assert found[id(model.layer[0].query.m)] == found[id(model.layer[0].value.m)] == 0.2
    assert {found[id(p)] for p in model.layer[1].query.roles().values()} == {0.3}
    assert found[id(model.layer[2].value.B)] > 16.0


def test_module_factors_are_relative_and_an_absolute_rate_wins():
    model = adapted_model(DoraLinear)
    given = {"ratios": {"B": 16.0}, "layer_decay": 0.5, "module_rates": {"layer.0.value": 0.3}}
    plain = rate_of(by_role(model, lr=2.0, **given))
    factors = {"head": 0.1, "m": 3.0, "layer.0.*": 0.25, "layer.0.query": 0.5}
    groups = by_role(model, lr=2.0, **given, module_factors=factors)
    found = rate_of(groups)
    assert {found[id(p)] / plain[id(p)] for p in model.head.parameters()} == {0.1}
    assert {found[id(p)] / plain[id(p)] for p in model.layer[0].query.roles().values()} == {0.5}
    assert {found[id(p)] for p in model.layer[0].value.roles().values()} == {0.3}
    assert found[id(model.layer[1].query.m)] / plain[id(model.layer[1].query.m)] == 3.0
    assert found[id(model.layer[1].query.B)] == plain[id(model.layer[1].query.B)]
    absolute = {id(p): group["absolute"] for group in groups for p in group["params"]}
    assert absolute[id(model.layer[0].value.A)] and not absolute[id(model.layer[0].query.A)]


@pytest.mark.parametrize("adapter", [LoraLinear, FullLinear, FixedLinear])
@pytest.mark.parametrize("store", [None, Nf4Store])
def test_norm_rates_follow_the_base_weight(adapter, store):
    model = adapted_model(adapter, bias="adapted", store=store)
    norms = {}
    for block in model.layer:
        layer = block.query
        weight = layer.roles().get("W")
        weight = layer.store.dequantize(torch.float32) if weight is None else weight
        norms |= {id(p): float(weight.detach().norm()) for p in layer.roles().values()}
    norms |= {id(p): float(p.detach().norm()) for p in model.head.parameters()}
    found = rate_of(by_role(model, lr=1e-3, norm_rates=0.5))
    for key, norm in norms.items():
        assert found[key] == pytest.approx(1e-3 * (1 + 0.5 * norm))


# ---- weight decay -------------------------------------------------------------------------------


def test_one_decay_is_for_matrices():
    model = adapted_model(DoraLinear, bias="adapted", train_modules=("embedding",))
    found = decay_of(by_role(model, lr=1e-3, weight_decay=0.1))
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert found[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0)


def test_a_decay_for_each_role_is_exact():
    model = adapted_model(DoraLinear)
    groups = by_role(model, lr=1e-3, ratios={"B": 4.0}, weight_decay={"B": 0.3, "m": 0.2})
    found = {group["name"]: group["weight_decay"] for group in groups}
    assert found == {"A": 0.0, "B": 0.3, "m": 0.2, "head": 0.0}


def test_the_decay_reaches_the_optimizer():
    model = adapted_model()
    layer = model.layer[0].query
    with torch.no_grad():
        layer.B.fill_(1.0)
    A = layer.A.detach().clone()
    optimizer = torch.optim.AdamW(
        by_role(model, lr=0.1, ratios={"B": 2.0}, weight_decay={"B": 0.5}), weight_decay=7.0
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.B, torch.full_like(layer.B, 1 - 0.2 * 0.5))
    assert torch.equal(layer.A, A)


# ---- errors and the table -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ratios": {"b": 16.0}},
            "ratios names the role 'b', which nothing here plays; the roles are A, B, head",
        ),
        ({"ratios": {"m": 2.0}}, "ratios names the role 'm', which nothing here plays"),
        ({"ratios": {"haed": 2.0}}, "Did you mean 'head'?"),
        ({"weight_decay": {"embedding": 0.1}}, "weight_decay names the role 'embedding'"),
        (
            {"module_rates": {"qeury": 1e-3}},
            "module_rates names 'qeury', which is no role and no trained module. Did you mean "
            "'query'?",
        ),
        ({"module_rates": {"norm": 1e-3}}, "module_rates names 'norm', which is no role"),
        ({"module_factors": {"norm": 0.1}}, "module_factors names 'norm', which is no role"),
        ({"module_factors": {"head": 0}}, "module_factors.head is 0; it must be positive"),
        ({"module_rates": {"head": -1}}, "module_rates.head is -1; it must be positive"),
        ({"ratios": {"B": 0}}, "ratios.B is 0; it must be positive"),
        ({"embedding_lr": 1e-3}, "embedding_lr is 0.001, but no embedding is trained"),
        ({"embedding_lr": "x"}, "embedding_lr is 'x'; it must be a number"),
        ({"weight_decay": "foo"}, "weight_decay is 'foo'; it must be a number"),
        ({"weight_decay": {"B": -1}}, "weight_decay.B is -1; it must be 0 or more"),
        ({"layer_decay": -1}, "layer_decay is -1; it must be positive"),
        ({"norm_rates": -1}, "norm_rates is -1; it must be 0 or more"),
    ],
    ids=str,
)
def test_what_does_not_exist_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        by_role(adapted_model(), lr=1e-3, **options)


def test_nothing_trainable_is_an_error():
    model = adapted_model(FixedLinear, head=())
    with pytest.raises(ValueError, match="nothing is trainable: no adapter, bias or head"):
        by_role(model, lr=1e-3)


def test_the_table_counts_every_parameter():
    model = adapted_model(DoraLinear)
    groups = by_role(model, lr=1e-3, ratios={"B": 16.0}, weight_decay=0.01)
    header, *lines = group_table(groups).splitlines()
    assert header.split() == ["role", "tensors", "parameters", "rate", "decay"]
    assert len(lines) == len(groups)
    rows = {(cells := line.split())[0] + cells[4]: cells for line in lines}
    assert rows["B0.01"] == ["B", "6", "96", "0.016", "0.01"]
    assert rows["m0"] == ["m", "6", "48", "0.001", "0"]
    counted = sum(int(line.split()[2].replace(",", "")) for line in lines)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert math.isclose(sum(group["lr"] for group in groups if group["name"] == "B"), 0.016)
