"""Parameters that a module's own code reads, adapted where they are: experts, projections of
nn.MultiheadAttention, embeddings, convolutions, routers, output layers."""

import copy
import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from contract import composed
from torch import nn
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter

import variants
from harness.adapter import peft_format
from harness.adapter.imported import ImportedLinear
from variants import AdapterLinear, DenseStore, DoraLinear, LoraLinear, Nf4Store, begin_step
from variants.inject import extract
from variants.layer import UnadaptedLinear
from variants.reading import ReadWeight
from variants.site import sites

CONF = Path(__file__).parent.parent / "conf"
VARIANTS = [
    path.stem
    for path in sorted((CONF / "variant").glob("*.yaml"))
    if not issubclass(composed(CONF, path.stem).adapter.func, UnadaptedLinear)
]
N, H, D = 3, 8, 12  # experts, hidden and inner features
TOKENS = 7
CONFIG = {
    "num_local_experts": N, "num_experts_per_tok": 2, "hidden_size": H, "intermediate_size": D,
    "hidden_act": "silu", "swiglu_alpha": 1.7, "swiglu_limit": 7.0,
    "ffn_hidden_size": D, "moe_num_experts": N, "ffn_act_fn": {"name": "silu"},
}  # fmt: skip


class Routed(nn.Module):
    """Experts of transformers; every token passes through two, and no token through the last."""

    def __init__(self, kind, how="eager"):
        super().__init__()
        self.experts = kind(SimpleNamespace(**CONFIG, _experts_implementation=how))

    def forward(self, x):
        first = torch.arange(len(x)) % 2
        weights = torch.stack([x[:, 0].sigmoid(), x[:, 1].tanh()], 1)
        return self.experts(x, torch.stack([first, 1 - first], 1), weights)


class Sorted(nn.Module):
    """Llama 4's, which are given a copy of every token each."""

    def __init__(self):
        super().__init__()
        self.experts = Llama4TextExperts(SimpleNamespace(**CONFIG))

    def forward(self, x):
        return self.experts(x.repeat(N, 1))


class Grouped(nn.Module):
    """JetMoE's, one parameter for each of their two maps."""

    def __init__(self):
        super().__init__()
        self.experts = JetMoeParallelExperts(N, H, D)

    def forward(self, x):
        return self.experts(x, [4, 3, 0])


class Attends(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.attention = nn.MultiheadAttention(H, 2, batch_first=True, **sizes)

    def forward(self, x):
        other = x[None, :, : self.attention.kdim]
        return self.attention(x[None], other, other)[0]


class Looks(nn.Module):
    """An embedding, and an output layer that is tied to it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, H, padding_idx=2)
        self.head = nn.Linear(H, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed((x[:, 0] * 100).long().abs() % 11).tanh())


class Convolves(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.conv = kind(4, 6, 3, padding=1, **options)

    def forward(self, x):
        axes = self.conv.weight.ndim - 2
        return self.conv(x[:, :4].T.reshape(1, 4, TOKENS, *[1] * (axes - 1)))


class Routes(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = MixtralTopKRouter(SimpleNamespace(**CONFIG))

    def forward(self, x):
        return self.gate(x)[0]


# Name -> the model, its targets, the matrices (o, i) under them.
MODELS = {
    **{f"mixtral {how}": (functools.partial(Routed, MixtralExperts, how), "all-linear",
                          [(2 * D, H), (H, D)] * N)
       for how in ("eager", "grouped_mm", "batched_mm")},
    **{f"gpt_oss {how}": (functools.partial(Routed, GptOssExperts, how), ["experts"],
                          [(2 * D, H), (H, D)] * N)
       for how in ("eager", "grouped_mm", "batched_mm")},
    "llama4": (Sorted, "all-linear", [(2 * D, H), (H, D)] * N),
    "dbrx": (functools.partial(Routed, DbrxExperts), "all-linear", [(D, H), (D, H), (H, D)] * N),
    "jetmoe": (Grouped, "all-linear", [(D, H)] * N),
    "attention": (Attends, "all-linear", [(3 * H, H), (H, H)]),
    "attention to others": (functools.partial(Attends, kdim=5, vdim=5), "all-linear",
                            [(H, H), (H, 5), (H, 5), (H, H)]),
    "embedding": (Looks, ["embed"], [(H, 11)]),
    "tied output": (Looks, ["head"], [(11, H)]),
    "conv1d": (functools.partial(Convolves, nn.Conv1d), ["conv"], [(6, 12)]),
    "conv2d in groups": (functools.partial(Convolves, nn.Conv2d, groups=2), ["conv"], [(6, 18)]),
    "router": (Routes, ["gate"], [(N, H)]),
}  # fmt: skip


def built(name):
    torch.manual_seed(0)
    model = MODELS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    return model


def injected(name, variant, **options):
    model = built(name)
    targets = options.pop("targets", MODELS[name][1])
    layers = variants.inject(model, variant, seed=0, targets=targets, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers.values():
            for parameter in layer.roles().values():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model, layers


def low_rank(adapter=LoraLinear, **options):
    return variants.Variant(
        name="test", lr=1.0, groups=variants.by_role, store=options.pop("store", DenseStore),
        adapter=functools.partial(adapter, **{"rank": 2, "alpha": 6, **options}),
    )  # fmt: skip


def answer_of(name, weights, layers, x):
    """The answer of the plain model in float64 whose matrices are W' (o, i), by path, each put by
    hand where the model's code keeps it."""
    model, parameters, stacks = built(name).double(), {}, {}
    for module in model.modules():
        if hasattr(module, "config"):  # grouped_mm knows no float64
            module.config._experts_implementation = "eager"
    for path, W in weights.items():
        *owner, last = path.split(".")
        if layers[path].bias is not None:
            parameters[f"{path}.bias"] = layers[path].bias.detach().double()
        if owner and owner[-1].isdigit():
            transposed = name.startswith(("gpt_oss", "llama4")) or last == "w2"
            stack = stacks.setdefault(".".join([*owner[:-1], last]), {})
            stack[int(owner[-1])] = W.T if transposed else W
        else:
            full = (
                path
                if model.get_submodule(".".join(owner))._parameters.get(last) is not None
                else f"{path}.weight"
            )
            parameters[full] = W.T if path == "embed.weight" else W
    for full, stack in stacks.items():
        parameters[full] = torch.stack([stack[n] for n in range(N)])
    shaped = {full: W.reshape(model.get_parameter(full).shape) for full, W in parameters.items()}
    return torch.func.functional_call(model, shaped, (x,), tie_weights=False)


def x_and_dy(model):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, H, generator=generator)
    with torch.no_grad():
        y = model(x)
    return x, torch.randn(y.shape, generator=generator)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_read_parameter_is_adapted_in_value_and_gradient(name, variant):
    """Against the plain model in float64 whose parameters are W', and the chain rule from there."""
    model, layers = injected(name, composed(CONF, variant, "rank=2", "alpha=6"))
    shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    assert sorted(shapes) == sorted(MODELS[name][2])
    weights = {path: layer.adapted_weight().double() for path, layer in layers.items()}
    for W in weights.values():
        W.requires_grad_()
    x, dy = x_and_dy(model)
    inputs = [x.requires_grad_(), x.detach().double().requires_grad_()]
    y, expected = model(inputs[0]), answer_of(name, weights, layers, inputs[1])
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    y.backward(dy)
    expected.backward(dy.double())
    if inputs[1].grad is not None:  # but of indices
        torch.testing.assert_close(inputs[0].grad.double(), inputs[1].grad, rtol=1e-3, atol=1e-4)
    for path, layer in layers.items():
        trained = [p for role, p in layer.roles().items() if role != "bias"]
        G = weights[path].grad
        if all(parameter.grad is None for parameter in trained):  # no token reaches it
            assert f".{N - 1}." in path and not G.any()
            continue
        reference = torch.autograd.grad(layer.definition(layer.base_weight()), trained, G.float())
        for parameter, gradient in zip(trained, reference, strict=True):
            scale = float(gradient.abs().max())
            assert scale > 0 or not G.any()
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("name", MODELS)
def test_what_was_read_can_be_taken_out_again(name):
    model, layers = injected(name, low_rank())
    plain, (x, _) = built(name), x_and_dy(model)
    expected = model(x)
    copied = copy.deepcopy(model)  # has layers of its own
    with torch.no_grad():
        for layer in layers.values():
            layer.B.zero_()
    torch.testing.assert_close(copied(x), expected)
    assert (model(x) - expected).abs().max() > 1e-3
    extract(copied, torch.float32)
    assert {n: p.shape for n, p in copied.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters(remove_duplicate=not isinstance(plain, Looks))
    }
    assert all(
        isinstance(m, type(c)) for m, c in zip(plain.modules(), copied.modules(), strict=True)
    )
    torch.testing.assert_close(copied(x), expected, rtol=1e-4, atol=1e-5)


def test_a_mixtures_names():
    """A stack, an expert or one of its matrices; what is not chosen stays as it is."""

    def chosen(targets, **options):
        model, layers = injected("mixtral eager", low_rank(**options), targets=targets)
        x, _ = x_and_dy(model)
        weights = {path: layer.adapted_weight().double() for path, layer in layers.items()}
        expected = answer_of("mixtral eager", everything | weights, every, x.double())
        torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)
        return list(layers)

    plain = built("mixtral eager").experts
    names = [f"experts.{n}.{name}" for name in ("gate_up_proj", "down_proj") for n in range(N)]
    everything = {p: getattr(plain, p.split(".")[2])[int(p.split(".")[1])].double() for p in names}
    _, every = injected("mixtral eager", low_rank())
    assert list(every) == names
    assert (
        chosen(["experts"])
        == chosen("all-linear")
        == chosen(["gate_up_proj", "down_proj"])
        == names
    )
    assert chosen(["experts.down_proj"]) == names[N:]
    assert chosen(["experts.1.gate_up_proj", "experts.0.down_proj"]) == [names[1], names[3]]
    assert chosen(["*.2.*"]) == [names[2], names[5]]
    with pytest.raises(
        ValueError, match=r"'gate_proj' matches no layer of the model. Did you mean 'g"
    ):
        chosen(["gate_proj"])


def test_every_expert_may_have_a_rank_of_its_own():
    pattern = {"down_proj": 3, "experts.1.down_proj": 4}
    _, layers = injected("mixtral eager", low_rank(), rank_pattern=pattern)
    ranks = {path: layer.active_rank() for path, layer in layers.items()}
    assert list(ranks.values()) == [2, 2, 2, 3, 4, 3]
    with pytest.raises(ValueError, match=r"rank is 9; experts.0.gate_up_proj is 24 x 8"):
        injected("mixtral eager", low_rank(), rank_pattern={"experts.0.gate_up_proj": 9})


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
def test_experts_form_no_dense_weight_and_drop_their_input(how):
    """W' of an expert has as many entries as its tokens' features only by chance."""
    model, layers = injected(f"mixtral {how}", low_rank(dropout=0.5))
    x, _ = x_and_dy(model.eval())
    still = model(x)
    begin_step(layers, 1)
    first = model.train()(x)
    begin_step(layers, 2)
    second = model(x)
    begin_step(layers, 1)
    assert torch.equal(model(x), first)
    assert not torch.equal(first, second) and not torch.equal(first, still)
    for layer in layers.values():
        layer.definition = None  # whoever forms W' calls it
    model.eval()(x).sum().backward()
    assert torch.equal(model(x), still)


def test_a_read_weight_drops_nothing_where_it_is_computed():
    model, layers = injected("attention", low_rank(dropout=0.5))
    begin_step(layers, 1)
    with pytest.raises(
        ValueError, match=r"dropout is 0.5, but this model's code reads the weight of a"
    ):
        model.train()(torch.randn(TOKENS, H))


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
@pytest.mark.parametrize(
    "read",
    [
        lambda W: W.transpose(dim0=1, dim1=2),
        lambda W: W.T,
        lambda W: W.view(size=(N * H, -1)),
        lambda W: W.reshape(shape=(N * H, -1)),
        lambda W: W.view(torch.int32),
        lambda W: torch.bmm(input=torch.ones(N, 2, D), mat2=W.mT),
        lambda W: torch.ones(1, 2, D) @ W.mT,
        lambda W: torch.matmul(input=torch.ones(N, 2, D), other=W.mT),
    ],
)
def test_a_read_stack_answers_as_a_tensor_does(read):
    model, layers = injected("mixtral eager", low_rank())
    stack = torch.stack([layers[f"experts.{n}.down_proj"].adapted_weight() for n in range(N)])
    found, expected = read(model.experts.down_proj), read(stack)
    found = found.dense() if isinstance(found, ReadWeight) else found
    torch.testing.assert_close(found, expected)


def test_a_merged_expert_is_one_product():
    model, layers = injected("mixtral eager", low_rank())
    x, _ = x_and_dy(model)
    expected = model(x)
    for layer in layers.values():
        layer.merge()
        layer.A = None
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_state_of_read_layers_goes_round(name):
    model, layers = injected(name, low_rank(store=Nf4Store))
    state = variants.state.trained_state(model, layers)
    assert set(state) == {f"{path}.{role}" for path in layers for role in "AB"}
    other, others = injected(name, low_rank(store=Nf4Store))
    for layer in others.values():
        layer.A.data.zero_()
    variants.state.load_trained_state(other, others, state)
    x, _ = x_and_dy(model)
    assert torch.equal(model(x), other(x))


def test_experts_in_four_bits_are_held_in_no_other_way():
    model, layers = injected("mixtral eager", low_rank(store=Nf4Store))
    assert not [n for n, p in model.named_parameters() if p.ndim == 3]
    stack = built("mixtral eager").experts.down_proj
    for n in range(N):
        kept = layers[f"experts.{n}.down_proj"].store
        assert torch.equal(kept.codes, Nf4Store(stack[n]).codes)
        assert not [p for p in kept.parameters() if p.is_floating_point()]


def test_an_embedding_looks_its_rows_up():
    """Without a dense W', the padding's row without a gradient, at LoRA+'s rate for embeddings."""
    model, layers = injected("embedding", low_rank())
    layer = layers["embed.weight"]
    index = torch.tensor([[1, 2, 2], [5, 1, 0]])
    rows = model.embed(index)
    torch.testing.assert_close(rows, layer.adapted_weight().T[index])
    layer.definition = None
    model.embed(index).sum().backward()
    assert layer.A.grad[:, [0, 1, 5]].all() and not layer.A.grad[:, [2, 3, 4]].any()
    groups = variants.by_role(model, lr=1.0, ratios={"B": 4.0}, embedding_lr=0.5)
    assert {(group["name"], group["lr"], group["absolute"]) for group in groups} == {
        ("A", 0.5, True), ("B", 0.5, True)
    }  # fmt: skip


def test_layers_stand_where_the_parameters_stood():
    model, layers = injected("conv2d in groups", low_rank())
    assert list(layers) == ["conv.weight"]
    assert model.conv.weight.shape == (6, 2, 3, 3) and model.conv.groups == 2
    assert isinstance(dict(model.named_modules())["conv.weight"], AdapterLinear)
    assert isinstance(model.conv, nn.Conv2d) and type(model.conv).__name__ == "Conv2d"
    with pytest.raises(ValueError, match=r"writes the weight of conv\.weight in place"):
        model.conv.weight.mul_(2)


# ---- PEFT ----------------------------------------------------------------------------------------

# Name -> PEFT's options for the same parameters.
THEIRS = {
    **{name: {"target_modules": [], "target_parameters": targets}
       for name, targets in {
           "mixtral eager": ["experts.gate_up_proj", "experts.down_proj"],
           "gpt_oss grouped_mm": ["experts.gate_up_proj", "experts.down_proj"],
           "llama4": ["experts.gate_up_proj", "experts.down_proj"],
           "jetmoe": ["experts.weight"],
           "router": ["gate.weight"],
       }.items()},
    "embedding": {"target_modules": ["embed"]},
    "conv1d": {"target_modules": ["conv"]},
    "conv2d": {"target_modules": ["conv"]},
    "tied output": {"target_modules": ["head"]},
}  # fmt: skip
MODELS["conv2d"] = (functools.partial(Convolves, nn.Conv2d, stride=2), ["conv"], [(6, 36)])
ABOUT = {"dropout": 0.0, "bias": "none", "train_modules": []}


# PEFT says so of the patterns of parameters, and heeds them.
heeded = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
heeded_too = pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")


def loaded(name, folder):
    config = peft.PeftConfig.from_pretrained(folder)
    config.task_type = None  # these generate nothing
    return peft.PeftModel.from_pretrained(built(name), folder, config=config)


@heeded
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("adapter", [LoraLinear, DoraLinear])
def test_peft_reads_what_was_adapted(tmp_path, name, adapter):
    pattern = {"down_proj": 3} if "down_proj" in str(THEIRS[name]) else {}
    model, layers = injected(name, low_rank(adapter), rank_pattern=pattern)
    x, _ = x_and_dy(model)
    write = functools.partial(
        peft_format.write, tmp_path, model=model, layers=layers, base="base", config=ABOUT
    )
    if adapter is DoraLinear and "target_parameters" in THEIRS[name]:
        with pytest.raises(peft_format.NotLowRank, match="it has no magnitude for "):
            write()
        return
    write()
    torch.testing.assert_close(loaded(name, tmp_path)(x), model(x), rtol=1e-4, atol=1e-5)
    assert (model(x) - built(name)(x)).abs().max() > 1e-2


@pytest.mark.parametrize("bias", ["adapted", "all"])
@pytest.mark.parametrize("name", ["gpt_oss eager", "conv2d", "attention"])
def test_the_biases_of_what_is_read_are_trained_and_travel(tmp_path, name, bias):
    model, layers = injected(name, dataclasses.replace(low_rank(), bias=bias))
    trained = {n: p for n, p in model.named_parameters() if "bias" in n and p.requires_grad}
    assert set(trained) == {n for n, _ in built(name).named_parameters() if "bias" in n}
    groups = variants.by_role(model, lr=1.0, weight_decay=0.1)
    (of_biases,) = [group for group in groups if group["name"] == "bias"]
    assert set(map(id, of_biases["params"])) == set(map(id, trained.values()))
    assert of_biases["weight_decay"] == 0.0
    if name == "attention":
        return  # PEFT would add the change of its output layer twice
    for parameter in trained.values():
        parameter.data += 0.3
    about = {**ABOUT, "bias": bias}
    peft_format.write(tmp_path, model=model, layers=layers, base="base", config=about)
    x, _ = x_and_dy(model)
    torch.testing.assert_close(loaded(name, tmp_path)(x), model(x), rtol=1e-4, atol=1e-5)
    assert set(peft_format.read(tmp_path).others) == set(trained)


@heeded
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("dora", [False, True])
def test_what_peft_adapted_is_read(tmp_path, name, dora):
    """By restoring it, and by starting from it."""
    if dora and "target_parameters" in THEIRS[name]:
        return  # PEFT refuses
    options = {**THEIRS[name], "use_dora": dora, "r": 2, "lora_alpha": 6}
    pattern = {"down_proj": 3} if "down_proj" in str(THEIRS[name]) else {}
    config = peft.LoraConfig(**options, rank_pattern=pattern)
    theirs = peft.get_peft_model(built(name), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(tmp_path)
    model = built(name)
    x, _ = x_and_dy(model)
    expected = theirs(x)
    adapter = peft_format.read(tmp_path).placed(model, sites(model).values())
    variant = dataclasses.replace(
        low_rank(), adapter=functools.partial(ImportedLinear, adapter=adapter)
    )
    layers = variants.inject(model, variant, seed=0, targets=sorted(adapter.factors))
    assert not adapter.beside(tmp_path, model, layers, "base")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)

    own, taken = injected(name, low_rank(DoraLinear if dora else LoraLinear, rank=3))
    placed = peft_format.read(tmp_path).placed(own, [layer.site for layer in taken.values()])
    for path, layer in taken.items():
        layer.take(placed.factors[path], placed.scales[path])
    torch.testing.assert_close(own(x), expected, rtol=1e-4, atol=1e-5)


@heeded
@heeded_too
@pytest.mark.parametrize(
    "alpha", [{"experts.0": 1.5}, {"experts.1": 12}], ids=["s differs", "one s"]
)
def test_a_stack_of_unequal_experts_is_padded_for_peft(tmp_path, alpha):
    """Some of other ranks, some not adapted at all."""
    pattern = {"experts.1.gate_up_proj": 4}
    targets = ["experts.0.gate_up_proj", "experts.1.gate_up_proj"]
    model, layers = injected(
        "mixtral eager", low_rank(), targets=targets, rank_pattern=pattern,
        alpha_pattern={f"{expert}.gate_up_proj": value for expert, value in alpha.items()},
    )  # fmt: skip
    x, _ = x_and_dy(model)
    peft_format.write(tmp_path, model=model, layers=layers, base="base", config=ABOUT)
    theirs = loaded("mixtral eager", tmp_path)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "targets", "reason"),
    [
        ("dbrx", "all-linear", r"experts.mlp.w1 is read from outside its module, where it finds"),
        ("conv2d in groups", ["conv"], "conv is a convolution in groups, dilated or padded by"),
        ("attention", ["out_proj"], "adds the change of out_proj in attention.out_proj twice"),
        ("attention", ["in_proj_weight"], "adds the change of out_proj in attention twice"),
    ],
)
def test_what_peft_cannot_hold_is_one_sentence(tmp_path, name, targets, reason):
    model, layers = injected(name, low_rank(), targets=targets)
    with pytest.raises(peft_format.NotLowRank, match=reason):
        peft_format.write(tmp_path, model=model, layers=layers, base="base", config=ABOUT)


def test_what_peft_changes_twice_is_refused(tmp_path):
    theirs = peft.get_peft_model(built("attention"), peft.LoraConfig(target_modules=["attention"]))
    theirs.save_pretrained(tmp_path)
    model = built("attention")
    with pytest.raises(ValueError, match=r"attention\S*, of an nn.Multihead\S+, whose output"):
        peft_format.read(tmp_path).placed(model, sites(model).values())
