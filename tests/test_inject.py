"""Choosing layers: what a pattern means, what is refused in which words, what is trained."""

import copy
import dataclasses
import functools
import hashlib
from pathlib import Path

import architectures
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import variants
from variants import AdapterLinear, DoraLinear, FixedLinear, FullLinear, LoraLinear, Nf4Store
from variants.inject import inject
from variants.select import layer_index, matches, nearest

CONF = Path(__file__).parent.parent / "conf"
NAMES = sorted(file.stem for file in (CONF / "variant").glob("*.yaml"))


def low_rank(*arguments, rank=2, alpha=4, **options):
    return LoraLinear(*arguments, rank=rank, alpha=alpha, **options)


def variant_of(adapter=low_rank, **options):
    return variants.Variant(
        name="test", lr=1e-3, adapter=adapter, groups=variants.by_role, **options
    )


def bert(**options):
    config = BertConfig(
        vocab_size=50,
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def llama(tied=False):
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=20,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def chosen(model, targets="all-linear", **options):
    return list(inject(model, variant_of(), seed=0, targets=targets, **options))


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def snapshot(model):
    """Everything that an error must leave as it was."""
    return (
        repr(model),
        {name: (id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()},
        hashlib.sha256(
            b"".join(p.detach().float().numpy().tobytes() for p in model.parameters())
        ).digest(),
    )


def assert_refused(model, message, *, variant=None, **options):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        inject(model, variant or variant_of(), seed=0, **options)
    assert snapshot(model) == before


# ---- patterns -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("encoder.layer.0.self.query", "query", True),
        ("encoder.layer.0.self.query", "self.query", True),
        ("query", "query", True),
        ("encoder.layer.0.self.subquery", "query", False),
        ("encoder.layer.0.self.query", "elf.query", False),
        ("encoder.layer.0.self.query", "self", False),
        ("encoder.layer.0.self.Query", "query", False),
        ("encoder.layer.0.self.query", "*.query", True),
        ("encoder.layer.0.self.query", "encoder.layer.[01].*", True),
        ("encoder.layer.2.self.query", "encoder.layer.[01].*", False),
        ("encoder.layer.0.self.query", "quer?", False),
        ("encoder.layer.0.self.query", "*.quer?", True),
        ("a.b", "aXb", False),
        ("aXb", "a.b", False),
    ],
)
def test_a_pattern_is_a_suffix_at_a_dot_or_a_glob_of_the_whole_path(path, pattern, expected):
    assert matches(path, pattern) is expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("encoder.layer.3.output.dense", 3),
        ("encoder.block.12.layer.1.wi", 12),
        ("0", 0),
        ("layer10.query", None),
        ("classifier", None),
    ],
)
def test_the_depth_is_the_first_number_of_a_path(path, expected):
    assert layer_index(path) == expected


def test_the_nearest_word_is_offered_only_if_it_is_near():
    assert nearest("qeury", ["query", "value"]) == " Did you mean 'query'?"
    assert nearest("embedding_table", ["query", "value"]) == ""


# ---- what is chosen -----------------------------------------------------------------------------


def test_all_linear_takes_every_linear_layer_but_the_trained_head():
    model = bert()
    every = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = chosen(model, train_modules=["classifier"])
    assert found == [path for path in every if path != "classifier"]  # in the model's order
    assert len(found) == 3 * 6 + 1
    assert isinstance(model.classifier, nn.Linear)


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_leaves_the_output_layer_of_a_language_model(tied):
    model = llama(tied)
    found = chosen(model)
    assert len(found) == 2 * 7 and not any("lm_head" in path for path in found)
    model(input_ids=torch.randint(0, 40, (2, 5))).logits.sum().backward()


def test_an_untied_output_layer_can_be_named():
    assert chosen(llama(), ["lm_head", "q_proj"])[-1] == "lm_head"


@pytest.mark.parametrize("targets", ["query", ["query"], ["*.query"], ["self.query", "query"]])
def test_lists_and_single_names(targets):
    found = chosen(bert(), targets)
    assert found == [f"bert.encoder.layer.{n}.attention.self.query" for n in range(3)]


def test_a_name_of_layers_at_several_places_takes_all():
    found = chosen(bert(), ["dense"], train_modules=["classifier"])
    assert len(found) == 3 * 3 + 1 and "bert.pooler.dense" in found
    assert len(chosen(bert(), ["attention.output.dense"])) == 3


@pytest.mark.parametrize(
    ("layers", "depths"),
    [("all", {0, 1, 2}), ([0, 2], {0, 2}), ([-1], {2}), ("last:2", {1, 2}), ("last:3", {0, 1, 2})],
    ids=str,
)
def test_layers_select_depths(layers, depths):
    found = chosen(bert(), ["query", "value"], layers=layers)
    assert {layer_index(path) for path in found} == depths
    assert len(found) == 2 * len(depths)


def test_selecting_depths_leaves_out_what_lies_outside_the_stack():
    assert "bert.pooler.dense" in chosen(bert(), ["dense"])
    assert "bert.pooler.dense" not in chosen(bert(), ["dense"], layers="last:3")


def test_patterns_of_rank_and_alpha_reach_their_layers_and_the_last_wins():
    model = bert()
    layers = inject(
        model,
        variant_of(),
        seed=0,
        targets=["query", "value"],
        rank_pattern={"value": 3, "*layer.2*": 5},
        alpha_pattern={"query": 7},
    )
    ranks = {path: layer.active_rank() for path, layer in layers.items()}
    for path, layer in layers.items():
        expected = 5 if "layer.2" in path else 3 if path.endswith("value") else 2
        assert ranks[path] == layer.A.shape[0] == expected
        assert layer.scale == pytest.approx((7 if path.endswith("query") else 4) / expected)


def test_options_are_found_through_keyword_arguments_of_a_subclass():
    import functools

    adapter = functools.partial(DoraLinear, rank=2, alpha=4)
    layers = inject(
        bert(), variant_of(adapter), seed=0, targets=["query"], rank_pattern={"query": 3}
    )
    assert {layer.active_rank() for layer in layers.values()} == {3}


def test_a_layer_used_at_two_places_is_adapted_at_both():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.again = nn.ModuleList([self.first, nn.Linear(6, 6)])

        def forward(self, x):
            return self.again[1](self.again[0](self.first(x)))

    model = Shared()
    layers = inject(model, variant_of(), seed=0)
    assert list(layers) == ["first", "again.1"]
    assert model.again[0] is model.first is layers["first"]
    assert not any(type(module) is nn.Linear for module in model.modules())


# ---- what is trained ----------------------------------------------------------------------------


def test_only_adapters_and_the_named_modules_are_trained():
    model = bert()
    inject(model, variant_of(), seed=0, targets=["query"], train_modules=["classifier"])
    attention = "bert.encoder.layer.{}.attention.self.query.{}"
    expected = {attention.format(n, role) for n in range(3) for role in "AB"}
    assert trainable(model) == expected | {"classifier.weight", "classifier.bias"}


def test_modules_trained_as_they_are_become_float32():
    model = bert().to(torch.bfloat16)
    inject(model, variant_of(), seed=0, targets=["query"], train_modules=["classifier", "pooler"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "bert.pooler.dense.bias"} <= set(trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert model.bert.encoder.layer[0].attention.self.value.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (bert, "query"),
        (bert, "LayerNorm"),
        (bert, "encoder.layer.1"),
        (bert, "embeddings"),
        (llama, "layers.1"),  # whose attention is handed a pair of tensors, and a mask
        (llama, "model.norm"),
        (llama, "lm_head"),
        (lambda: llama(tied=True), "embed_tokens"),  # the output layer is the same tensor
        (llama, "*layers.1*"),  # modules in modules
    ],
)
def test_a_float32_module_in_a_model_of_lower_precision(build, name, dtype):
    torch.manual_seed(1)
    model = build().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    exact = copy.deepcopy(model).float()
    targets = ["dense"] if isinstance(model, BertForSequenceClassification) else ["o_proj"]
    ids = torch.tensor([[3, 7, 9, 0, 0], [11, 2, 5, 8, 4]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    seen, found = {}, []
    for each in (model, exact):
        trained = [path for path, _ in each.named_modules() if matches(path, name)]
        inject(each, variant_of(), seed=0, targets=targets, train_modules=[name])
        for path in trained:
            hook = functools.partial(_note_dtype, seen, path)
            each.get_submodule(path).register_forward_hook(hook)
        logits = each(**inputs).logits
        logits.float().square().mean().backward()
        gradients = [p.grad for _, p in sorted(each.named_parameters()) if p.requires_grad]
        found.append((logits.detach().float(), torch.cat([g.flatten() for g in gradients])))
        if each is model:
            assert seen[min(seen, key=len)] == dtype  # what the rest of the model is handed
            assert {g.dtype for g in gradients} == {torch.float32}
    for ours, expected in zip(*found, strict=True):
        assert (ours - expected).norm() < 0.05 * expected.norm()


def _note_dtype(seen, path, module, args, output):
    seen[path] = (output[0] if isinstance(output, tuple) else output).dtype


def test_a_module_of_float32_keeps_what_bfloat16_would_lose():
    model = llama().to(torch.bfloat16)
    inject(model, variant_of(), seed=0, targets=["o_proj"], train_modules=["lm_head"])
    states = torch.randn(3, 12).to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.fill_(1 + 2**-10)  # which bfloat16 would round to 1
        expected = states.double().sum(-1, keepdim=True) * (1 + 2**-10)
        assert torch.equal(model.lm_head(states), expected.to(torch.bfloat16).expand(3, 40))


def test_a_trained_module_is_not_adapted_as_well():
    found = chosen(bert(), train_modules=["encoder.layer.0", "classifier"])
    assert {layer_index(path) for path in found} == {1, 2, None}
    assert_refused(
        bert(),
        "target 'classifier' cannot be adapted: classifier is trained as it is",
        targets=["query", "classifier"],
        train_modules=["classifier"],
    )


@pytest.mark.parametrize("bias", ["none", "adapted", "all"])
def test_which_biases_are_trained(bias):
    model = bert()
    every = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    layers = inject(model, variant_of(bias=bias), seed=0, targets=["query", "value"])
    found = {name for name in trainable(model) if name.endswith("bias")}
    adapted = {f"{path}.bias" for path in layers}
    assert found == {"none": set(), "adapted": adapted, "all": every}[bias]
    for layer in layers.values():
        assert ("bias" in layer.roles()) == (bias != "none")
        assert ("bias" in layer.adapter_state()) == (bias != "none")


def test_adapted_biases_of_a_half_precision_base_are_trained_in_float32():
    model = bert().to(torch.bfloat16)
    layers = inject(model, variant_of(bias="adapted"), seed=0, targets=["query"])
    assert all(layer.bias.dtype == torch.float32 for layer in layers.values())
    model(input_ids=torch.randint(0, 50, (2, 5))).logits.sum().backward()
    assert all(layer.bias.grad is not None for layer in layers.values())


def test_full_fine_tuning_trains_weights_and_biases_also_where_there_are_none():
    layers = inject(bert(), variant_of(FullLinear), seed=0, targets=["query"])
    assert all(set(layer.roles()) == {"W", "bias"} for layer in layers.values())
    layers = inject(llama(), variant_of(FullLinear), seed=0)
    assert all(set(layer.roles()) == {"W"} for layer in layers.values())
    layers = inject(bert().to(torch.bfloat16), variant_of(FullLinear), seed=0, targets=["query"])
    for layer in layers.values():
        assert {p.dtype for p in layer.roles().values()} == {torch.float32}


def test_the_base_model_does_not_see_full_fine_tuning():
    model = nn.Sequential(nn.Linear(5, 4))
    linear = model[0]
    weight, bias = linear.weight.clone(), linear.bias.clone()
    layers = inject(model, variant_of(FullLinear), seed=0)
    with torch.no_grad():
        for parameter in layers["0"].roles().values():
            parameter.zero_()
    assert torch.equal(linear.weight, weight) and torch.equal(linear.bias, bias)


def test_layers_follow_the_mode_and_the_output_follows_the_input():
    model = bert().eval()
    layers = inject(model, variant_of(), seed=0, targets=["query"])
    assert not any(layer.training for layer in layers.values())
    model.train()
    assert all(layer.training for layer in layers.values())
    logits = model.eval()(input_ids=torch.randint(0, 50, (2, 5))).logits
    assert logits.shape == (2, 3)


def test_the_adapted_model_starts_as_the_base():
    model = bert().eval()
    tokens = torch.randint(0, 50, (2, 5))
    before = model(input_ids=tokens).logits
    inject(model, variant_of(), seed=0)
    torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=0, atol=1e-6)


# ---- what is refused ----------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.up = nn.Linear(8, 8)


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.norm = Conv1D(24, 8), nn.LayerNorm(24)

    def forward(self, x):
        return self.norm(self.c_attn(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"targets": ["query", "valeu"]},
            "target 'valeu' matches no layer of the model. Did you mean 'value'?",
        ),
        (
            {"targets": "all_linear"},
            "target 'all_linear' matches no layer of the model. Did you mean 'all-linear'?",
        ),
        ({"targets": ["query", "FAKE"]}, r"target 'FAKE' matches no layer of the model\."),
        ({"targets": ["query", "*.valeu"]}, r"target '\*\.valeu' matches no layer"),
        ({"targets": []}, "targets is empty; give layer names, globs or 'all-linear'"),
        (
            {"targets": ["LayerNorm"]},
            "target 'LayerNorm' cannot be adapted: bert.embeddings.LayerNorm is a LayerNorm, which "
            "holds no matrix; name those in it",
        ),
        (
            {"targets": ["query"], "layers": "first:2"},
            "layers is 'first:2'; it must be all, last:n",
        ),
        ({"targets": ["query"], "layers": [3]}, r"layers is \[3\]; this model's are 0 to 2"),
        ({"targets": ["query"], "layers": [-4]}, r"layers is \[-4\]; this model's are 0 to 2"),
        ({"targets": ["query"], "layers": "last:4"}, "layers is last:4; this model's are 0 to 2"),
        ({"targets": ["query"], "layers": "last:0"}, "layers is last:0; this model's are 0 to 2"),
        ({"targets": ["query"], "layers": []}, r"layers is \[\]; this model's are 0 to 2"),
        (
            {"targets": ["layer.1.attention.self.query"], "layers": [0, 1]},
            "match nothing in layer 0",
        ),
        (
            {"targets": ["query"], "rank_pattern": {"valeu": 3}},
            "rank_pattern names 'valeu', which is no adapted layer",
        ),
        (
            {"targets": ["query"], "rank_pattern": {"value": 3}},
            "rank_pattern names 'value', which is no adapted layer",
        ),
        (
            {"targets": ["query"], "alpha_pattern": {"qeury": 3}},
            "alpha_pattern names 'qeury', which is no adapted layer. Did you mean 'query'?",
        ),
        (
            {"targets": ["query"], "rank_pattern": {"query": 13}},
            r"rank is 13; bert.encoder.layer.0.attention.self.query is 12 x 12, so it must lie in "
            r"\[1, 12\]",
        ),
        (
            {"targets": ["query"], "train_modules": ["clasifier"]},
            "no module is named 'clasifier'. Did you mean 'classifier'?",
        ),
    ],
    ids=str,
)
def test_a_wrong_choice_is_one_sentence_and_leaves_the_model_whole(options, message):
    assert_refused(bert(), message, **options)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (Norms, {}, "all-linear found no linear layer; the model is made of LayerNorm"),
        (
            Norms,
            {"targets": ["norm"]},
            "norm is a LayerNorm, which holds no matrix; name those in it",
        ),
    ],
    ids=["all_linear", "norm"],
)
def test_layers_that_cannot_be_adapted_are_named(build, options, message):
    assert_refused(build(), message, **options)


def test_a_quantised_layer_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="1 is a quantised Linear; load the base unquantised"):
        inject(model, variant_of(), seed=0, targets=["1"])
    assert chosen(model) == ["0"]


@pytest.mark.parametrize("key", ["rank", "alpha"])
def test_an_option_that_the_variant_lacks_is_refused(key):
    assert_refused(
        bert(),
        f"{key}_pattern is given, but variant 'test' has no {key}",
        variant=variant_of(FixedLinear),
        targets=["query"],
        **{f"{key}_pattern": {"query": 3}},
    )


@pytest.mark.parametrize(
    ("model", "bias", "message"),
    [
        (llama, "adapted", "bias=adapted would train nothing: there is no bias to train"),
        (llama, "all", "bias=all would train nothing: there is no bias to train"),
        (bert, "lora_only", "bias is 'lora_only'; it must be none, adapted or all"),
        (
            lambda: bert().to(torch.bfloat16),
            "all",
            "bias=all would train bert.embeddings.LayerNorm.bias in torch.bfloat16: use bias=adapt",
        ),
    ],
    ids=["no_adapted", "no_bias", "unknown", "half_precision"],
)
def test_biases_that_cannot_be_trained_are_refused_before_anything_changes(model, bias, message):
    assert_refused(model(), message, variant=variant_of(bias=bias), train_modules=[])


def test_a_second_injection_is_refused():
    model = bert()
    inject(model, variant_of(), seed=0, targets=["query"])
    assert_refused(model, "this model has adapters already; load the base again", targets=["value"])


def test_a_store_that_refuses_a_weight_leaves_the_model_whole():
    model = bert()
    with torch.no_grad():
        model.bert.pooler.dense.weight[0, 0] = float("nan")
    before = snapshot(model)
    variant = dataclasses.replace(variant_of(), store=Nf4Store)
    with pytest.raises(ValueError, match="NaN"):
        inject(model, variant, seed=0)
    assert snapshot(model)[:2] == before[:2]
    assert not any(isinstance(module, AdapterLinear) for module in model.modules())


# ---- options that would be ignored --------------------------------------------------------------


def test_the_head_is_marked_and_other_trained_modules_are_not():
    model = bert()
    inject(model, variant_of(), seed=0, head=["classifier"], train_modules=["pooler"])
    marked = [path for path, m in model.named_modules() if getattr(m, "is_head", False)]
    assert marked == ["classifier"]
    assert model.bert.pooler.dense.weight.requires_grad


def test_a_penalty_that_no_layer_has():
    assert_refused(bert(), "have no penalty; leave it out", variant=variant_of(penalty_weight=0.5))


def test_a_choice_of_layers_that_trains_nothing():
    fixed = variant_of(adapter=FixedLinear)
    for choice in ({"targets": ["query"]}, {"layers": "last:1"}):
        assert_refused(bert(), "targets and layers choose nothing", variant=fixed, **choice)
    inject(bert(), variant_of(adapter=FixedLinear, bias="adapted"), seed=0, targets=["query"])


# ---- layers narrower than the rank ---------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate = nn.Linear(12, 10), nn.Linear(12, 1)

    def forward(self, x):
        return self.gate(x).sigmoid() * self.up(x)


@pytest.mark.parametrize("name", NAMES)
def test_all_linear_lowers_the_rank_of_a_narrow_layer_and_keeps_its_scale(name):
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        config = compose("config", [f"variant={name}", "rank=4", "alpha=6"])
    variant = dataclasses.replace(instantiate(config.variant, _convert_="all"), bias="none")
    model = Gated()
    layers = inject(copy.deepcopy(model), variant, seed=0)
    assert list(layers) == ["up", "gate"]
    if not isinstance(layers["up"], variants.LowRankLinear):  # there is no rank
        return
    assert (layers["up"].active_rank(), layers["gate"].active_rank()) == (4, 1)
    alone = inject(model, variant, seed=0, targets=["up"])["up"]
    assert layers["gate"].scale == layers["up"].scale == alone.scale
    for role, parameter in layers["up"].roles().items():
        assert torch.equal(parameter, alone.roles()[role])


@pytest.mark.parametrize("alpha", [5, None])
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_the_scale_of_a_narrow_layer_is_that_of_the_others(scaling, alpha):
    adapter = functools.partial(LoraLinear, rank=6, alpha=alpha, scaling=scaling)
    layers = inject(Gated(), variant_of(adapter), seed=0)
    assert layers["gate"].scale == pytest.approx(layers["up"].scale, rel=1e-14)


def test_a_narrow_layer_may_have_an_alpha_of_its_own():
    """alpha 2 at rank 4 is s = 0.5, which rank 1 keeps."""
    adapter = functools.partial(LoraLinear, rank=4, alpha=6)
    layers = inject(Gated(), variant_of(adapter), seed=0, alpha_pattern={"gate": 2})
    assert (layers["gate"].active_rank(), layers["gate"].scale) == (1, 0.5)
    assert (layers["up"].active_rank(), layers["up"].scale) == (4, 1.5)


def test_a_rank_that_no_layer_holds_is_a_mistake_unless_a_pattern_gives_the_wide_one_its_own():
    adapter = functools.partial(LoraLinear, rank=11, alpha=6)
    with pytest.raises(ValueError, match="rank is 11; up is 10 x 12"):
        inject(Gated(), variant_of(adapter), seed=0)
    layers = inject(Gated(), variant_of(adapter), seed=0, rank_pattern={"up": 3})
    assert {path: layer.active_rank() for path, layer in layers.items()} == {"up": 3, "gate": 1}


def test_a_rank_given_by_name_is_not_lowered():
    adapter = functools.partial(LoraLinear, rank=2, alpha=4)
    options = {"rank_pattern": {"gate": 2}}
    assert_refused(Gated(), r"rank is 2; gate is 1 x 12, so it must lie in \[1, 1\]",
                   variant=variant_of(adapter), **options)  # fmt: skip
    assert_refused(Gated(), "rank is 2; gate is 1 x 12", variant=variant_of(adapter),
                   targets=["gate"])  # fmt: skip


# ---- a matrix that its module keeps transposed ---------------------------------------------------


@pytest.mark.parametrize("store", [variants.DenseStore, Nf4Store])
@pytest.mark.parametrize(
    "adapter", [low_rank, functools.partial(DoraLinear, rank=2, alpha=4), FullLinear]
)
def test_a_conv1d_is_adapted_and_given_back(adapter, store):
    """By its own forward pass in float64, whose weight is (i, o)."""
    torch.manual_seed(3)
    model, plain = Gpt(), Gpt()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, 8)
    layer = inject(model, variant_of(adapter, store=store), seed=0, targets=["c_attn"])["c_attn"]
    with torch.no_grad():
        for parameter in layer.roles().values():
            parameter += 0.1 * torch.randn_like(parameter)
    W = layer.adapted_weight()
    assert W.shape == (24, 8) and model.c_attn.weight.shape == (8, 24)
    given = layer.export(torch.float32)
    assert type(given) is Conv1D and given.weight.shape == (8, 24) and given.nf == 24
    plain.c_attn.weight.data, plain.c_attn.bias.data = W.T, layer.bias.detach()
    expected = plain.double()(x.double())
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    model.c_attn = given
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert not [name for name, _ in model.named_modules() if "shell" in name]


def test_a_conv1d_is_rounded_as_w_and_then_transposed():
    """Blocks and rows of a store are those of W (o, i)."""
    layer = inject(Gpt(), variant_of(), seed=0, targets=["c_attn"])["c_attn"]
    for store in (Nf4Store, variants.Int8Store):
        given = layer.export(torch.float32, lambda W, kind=store: kind(W).dequantize(W.dtype))
        expected = store(layer.adapted_weight()).dequantize(torch.float32).T
        assert torch.equal(given.weight, expected)


def test_a_conv1ds_weight_reads_as_it_was_kept():
    model = Gpt()
    layer = inject(model, variant_of(), seed=0, targets=["c_attn"])["c_attn"]
    with torch.no_grad():
        layer.B += 1
    x = torch.randn(5, 8)
    torch.testing.assert_close(x @ model.c_attn.weight + layer.bias, layer(x))
    (x @ model.c_attn.weight).sum().backward()
    assert layer.B.grad is not None


# ---- words for the parts of a block --------------------------------------------------------------

# By hand, from the architectures' code: the last components of the paths.
PARTS = {
    "bert": ({"query", "key", "value", "attention.output.dense"},
             {"intermediate.dense", "output.dense"}),
    "gpt2": ({"attn.c_attn", "attn.c_proj"}, {"mlp.c_fc", "mlp.c_proj"}),
    "llama": ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}),
    "opt": ({"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}),
    "bloom": ({"query_key_value", "self_attention.dense"}, {"dense_h_to_4h", "dense_4h_to_h"}),
    "t5": ({"q", "k", "v", "o"}, {"wi", "wo"}),
    "falcon": ({"query_key_value", "self_attention.dense"}, {"dense_h_to_4h", "dense_4h_to_h"}),
    "bart": ({"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}),
    "xlnet": (set(), {"layer_1", "layer_2"}),
    "mamba": (set(), set()),
}  # fmt: skip


@pytest.mark.parametrize("kind", PARTS)
def test_attention_and_mlp_are_words_that_every_architecture_understands(kind):
    for word, names in zip(("attention", "mlp"), PARTS[kind], strict=True):
        model = architectures.BUILT[kind]()
        if not names:
            with pytest.raises(ValueError, match=f"target '{word}' matches no layer"):
                inject(model, variant_of(), seed=0, targets=[word])
            continue
        found = set(inject(model, variant_of(), seed=0, targets=word))
        everything = set(inject(architectures.BUILT[kind](), variant_of(), seed=0))
        expected = {
            path
            for path in everything
            if layer_index(path) is not None
            and max(
                (n for part in PARTS[kind] for n in part if matches(path, n)), key=len, default=""
            )
            in names
        }
        assert (
            found == expected and {n for n in names if any(matches(p, n) for p in found)} == names
        )
