"""The layers that a text passes through: autograd's own gradients are the oracle."""

import copy
import re

import pytest
import torch
from adapters import write_language_task
from architectures import EXPERTS, MODELS, WIDTH, causal, loss_of, multimodal, plain
from command import CommandLine
from torch import nn
from transformers import AutoModelForSequenceClassification

import variants
from harness.adapter.restore import restore
from harness.loop import laws
from harness.loop.laws import BrokenLaw
from harness.memory.trace import LiveBytes
from harness.models import passes, tiny
from variants import LoraLinear, site


def with_gradient(model):
    """Names of the parameters that a longer text gives a gradient."""
    model.zero_grad()
    loss_of(model)[1].backward()
    return {n for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_it_passes_through_what_gets_a_gradient(name):
    model = copy.deepcopy(plain(name))
    model.unused = nn.Linear(2, 3)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    forwards = {path: vars(m).get("forward") for path, m in model.named_modules()}
    passed = passes.through(model)
    assert all(torch.equal(p, before[n][0]) for n, p in model.named_parameters())
    assert all(p.requires_grad == before[n][1] for n, p in model.named_parameters())
    assert {path: vars(m).get("forward") for path, m in model.named_modules()} == forwards

    learning = with_gradient(model)
    linear = {f"{p}.weight" for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert passed.parameters & linear == linear & learning
    assert set(passed.matrices) <= learning and "unused.weight" not in passed.parameters


def test_a_look_leaves_no_trace():
    """Neither in what is frozen, nor in random numbers, nor in the mode."""
    model = tiny.load(labels=["a", "b"], seed=0).model.train()
    assert model.config.hidden_dropout_prob > 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before, state = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    passes.through(model)
    assert [p.requires_grad for p in model.parameters()] == before and model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_embeddings_and_output_layers_are_no_matrices_that_an_adapter_could_miss():
    model = causal("llama", tie_word_embeddings=False)
    matrices = passes.through(model).matrices
    assert matrices and all(name.startswith("model.layers.") for name in matrices)
    assert "lm_head.weight" in passes.through(model).parameters  # but one that it may be put on


def test_a_weight_that_is_trained_itself_is_not_left_out():
    model = causal("llama")
    matrices = passes.through(model).matrices
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("down_proj" in name)
    found = passes.coverage(passes.Passed(frozenset(), matrices), model, {}, chosen="all")
    trained = [count for name, count in matrices.items() if "down_proj" in name]
    assert found["adapted"] == sum(trained) > 0 and found["total"] == sum(matrices.values())
    assert not any("down_proj" in kind for kind in found["left_out"])


def test_a_word_claims_its_part_of_every_block():
    model = causal("mixtral", **EXPERTS, num_key_value_heads=2)
    passed = passes.through(model)
    layers = variants.inject(model, low_rank(), seed=0, targets=["q_proj"])
    found = {
        word: passes.coverage(passed, model, layers, chosen="all", word=word)
        for word in ("attention", "mlp", "experts", "all-linear")
    }
    sizes = {name: count for name, count in passed.matrices.items()}
    q, of_all = sum(n for name, n in sizes.items() if "q_proj" in name), sum(sizes.values())
    attention = sum(n for name, n in sizes.items() if "self_attn" in name)
    router = sum(n for name, n in sizes.items() if name.endswith("mlp.gate.weight"))
    expected = {"attention": (attention, q), "mlp": (of_all - attention, 0),
                "experts": (of_all - attention - router, 0), "all-linear": (of_all, q)}  # fmt: skip
    assert {word: (f["total"], f["adapted"]) for word, f in found.items()} == expected


@pytest.mark.parametrize(
    ("adapted", "word", "meant", "refused"),
    [(90, "all-linear", False, False), (89, "all-linear", False, True),
     (89, "all-linear", True, False), (9, "query", False, False), (10, "mlp", False, False),
     (9, "mlp", False, True), (9, "attention", True, False), (9, "experts", False, True)],
)  # fmt: skip
def test_a_word_reaches_what_it_sounds_like(adapted, word, meant, refused):
    found = {"total": 100, "adapted": adapted, "left_out": {"experts.w1": 100 - adapted}}
    if not refused:
        passes.check_coverage(found, word, meant)
        return
    said = rf"{word}, which adapts {adapted}% of .*experts.w1 \({100 - adapted}%\).*partial=true"
    with pytest.raises(ValueError, match=said):
        passes.check_coverage(found, word, meant)


class Mixture(nn.Module):
    """Experts that are called for the tokens that are theirs, found by asking for values."""

    def __init__(self, asks):
        super().__init__()
        self.asks, self.experts = asks, nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):  # b t i
        ours = (x[..., 0] > 0).long()  # b t
        out = torch.zeros_like(x)
        if self.asks == "a number":  # of experts that have tokens
            for number in range(int((ours + 1).max().item())):
                out = out + self.experts[number](x) * (ours == number)[..., None]
        elif self.asks == "a list":
            for number in sorted(set(ours.flatten().tolist())):
                out = out + self.experts[number](x) * (ours == number)[..., None]
        elif self.asks == "positions":
            for number, expert in enumerate(self.experts):
                row, place = torch.nonzero(ours == number, as_tuple=True)
                out = out.index_put((row, place), expert(x[row, place]), accumulate=True)
        elif self.asks == "a mask":
            for number, expert in enumerate(self.experts):
                if (ours == number).any():
                    out = out.masked_scatter((ours == number)[..., None], expert(x[ours == number]))
        return out


@pytest.mark.parametrize("asks", ["a number", "a list", "positions", "a mask"])
def test_experts_that_values_choose_are_found_with_values_and_without(asks):
    model = causal("llama").eval()
    for block in model.model.layers:
        block.mlp = Mixture(asks)
    passed = passes.through(model)
    every = {f"{p}.weight" for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert passed.parameters >= every and len(every) == 2 * (4 + 3) + 1
    without = copy.deepcopy(model).to("meta")
    assert passes.through(without).parameters >= every
    with LiveBytes(()):  # as the estimate of memory does, which answers for what is not there
        assert passes.through(without) == passed


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_values_lacks_no_layer(name):
    """It may be counted as a whole, which costs an estimate a little too much."""
    passed = passes.through(copy.deepcopy(plain(name)))
    model = copy.deepcopy(plain(name)).to("meta")
    model.tie_weights()  # which the move has undone
    with LiveBytes(()):
        without = passes.through(model)
    assert (
        without.parameters >= passed.parameters
        and without.matrices.items() >= passed.matrices.items()
    )


def test_the_vision_tower_of_a_text_is_left_alone():
    model = copy.deepcopy(plain("gemma3"))
    passed = passes.through(model)
    assert len([n for n in passed.parameters if n.endswith("_proj.weight")]) == 2 * 7
    assert not any("vision" in name for name in (*passed.parameters, *passed.matrices))


class Block(nn.Module):
    """A router that sends all tokens to one of its experts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.experts[1](x)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.tower = nn.Linear(4, 4)

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


def test_other_experts_wait_for_their_tokens():
    used = {"layers.0.experts.1", "layers.1.experts.1"}
    expected = [f"layers.{n}.experts.{e}" for n in (0, 1) for e in (0, 2)]
    assert passes.waiting_experts(Stack(), used) == expected
    assert passes.waiting_experts(Stack(), {"layers.0.experts.1"}) == expected[:2]  # no expert: 1


def low_rank(**options):
    return variants.Variant(
        name="test", lr=1.0, groups=variants.by_role, bias=options.pop("bias", "none"),
        adapter=lambda *given, **named: LoraLinear(*given, rank=2, alpha=4, **named),
    )  # fmt: skip


@pytest.mark.parametrize("targets", ["all-linear", ["experts.1", "tower"]])
def test_an_adapter_without_a_gradient_is_an_error(targets):
    model = Stack()
    watch = laws.GradientWatch(model, variants.inject(model, low_rank(), seed=0, targets=targets))
    for _ in range(2):
        model(torch.randn(3, 4)).sum().backward()
    with pytest.raises(BrokenLaw, match=r"^tower got no gradient in 1 of \d adapters"):
        watch.check()
    watch.check()  # it looks once


def test_a_gradient_of_zero_is_one():
    model = Stack()
    layers = variants.inject(model, low_rank(), seed=0, targets=["layers.*"])
    watch = laws.GradientWatch(model, layers)
    (0.0 * model(torch.randn(3, 4)).sum()).backward()
    watch.check()


# ---- what a run says and refuses -----------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


def saved(folder, kind, **sizes):
    """A random model of this architecture on the disk, with a tokenizer of bytes."""
    tokenizer = tiny.byte_tokenizer("llama")
    ids = {"vocab_size": len(tokenizer), "max_position_embeddings": 300}
    causal(kind, **{**ids, **sizes}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ["model=hf", f"model.name={folder}", "model.dtype=float32", "train.steps=2"]


def test_matrices_that_all_linear_leaves_out(run, tmp_path):
    """XLNet keeps its projections as (i, heads, o), and reads them in products of its own."""
    sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
    model = saved(tmp_path / "xlnet", "xlnet", max_position_embeddings=None, **sizes)
    assert run(*model) == 1
    assert "targets is all-linear, which adapts 3" in run.err and run.err.count("\n") < 3
    assert "transformer.layer.*.rel_attn.q (1" in run.err and "partial=true" in run.err
    assert not (tmp_path / "outputs").exists()
    for meant in ("partial=true", "targets=[layer_1,layer_2]"):
        assert run(*model, meant) == 0
        assert re.search(r"matrix weights \(3\d(\.\d)? %\); not transformer", run.out)
        found = run.result()["matrix_weights"]
        share = found["adapted"] / found["total"]
        assert 0.3 < share < 0.4
        assert found["adapted"] + sum(found["left_out"].values()) == found["total"]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "xlnet", num_labels=2)
    inner = (p for name, p in plain.named_parameters() if p.ndim > 1 and ".layer." in name)
    unread = sum(p.numel() for n, p in plain.named_parameters() if re.search("seg_embed|r_s_", n))
    assert found["total"] == sum(parameter.numel() for parameter in inner) - unread


def test_experts_are_adapted_one_by_one(run, tmp_path):
    model = saved(tmp_path / "mixtral", "mixtral", **EXPERTS, num_key_value_heads=2)
    assert run(*model) == 0
    found = run.result()["matrix_weights"]
    assert found["adapted"] > 0.98 * found["total"]
    assert list(found["left_out"]) == ["model.layers.*.mlp.gate.weight"]
    assert run(*model, "targets=experts", "partial=true", "seed=1") == 0, run.err
    assert set(run.result()["active_rank"]) == {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj"
        for layer in range(2) for expert in range(4) for name in ("gate_up", "down")
    }  # fmt: skip


def test_an_adapter_of_some_experts_is_restored(run, tmp_path):
    model = saved(tmp_path / "mixtral", "mixtral", **EXPERTS, num_key_value_heads=2)
    assert run(*model, "targets=[experts.1.down_proj,experts.3.gate_up_proj]") == 0, run.err
    layers = restore(next((tmp_path / "outputs" / "default").iterdir())).layers
    assert [path.split("experts.")[1] for path in layers] == 2 * ["3.gate_up_proj", "1.down_proj"]
    found = run.result()["matrix_weights"]
    assert found["adapted"] == sum(la.out_features * la.in_features for la in layers.values())
    assert found["adapted"] + sum(found["left_out"].values()) == found["total"]


def test_adapted_experts_wait_for_their_tokens():
    model = causal("mixtral", **EXPERTS, num_key_value_heads=2)
    variants.inject(model, low_rank(), seed=0)
    used = {"model.layers.0.mlp.experts.2.gate_up_proj", "model.layers.0.mlp.experts.2.down_proj"}
    expected = [f"model.layers.0.mlp.experts.{n}" for n in (0, 1, 3)]
    assert passes.waiting_experts(model, used) == expected


def test_an_adapter_of_before_experts_were_adapted_is_restored(run, tmp_path, monkeypatch):
    model = saved(tmp_path / "mixtral", "mixtral", **EXPERTS, num_key_value_heads=2)
    with monkeypatch.context() as before:
        before.setattr(site, "_experts", lambda *given: 0)
        assert run(*model, "partial=true") == 0
    folder = tmp_path / "outputs" / "default"
    layers = restore(next(folder.iterdir())).layers
    assert len(layers) == 8 and not [path for path in layers if "experts" in path]


def test_some_layers_are_all_of_what_was_asked_for(run):
    assert run("layers=[1]", "train.steps=1") == 0
    found = run.result()["matrix_weights"]
    assert found["adapted"] == found["total"] and not found["left_out"]


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj,v_proj]"])
def test_a_multimodal_model_is_trained_on_text(run, tmp_path, targets):
    folder = tmp_path / "gemma"
    multimodal(259 + 8).save_pretrained(folder)
    tiny.byte_tokenizer("llama").save_pretrained(folder)
    data = write_language_task(tmp_path)[1:]
    model = ["model=hf", f"model.name={folder}", "model.dtype=float32", "train.steps=2"]
    assert run(*model, *data, f"targets={targets}", "train.eval_every=2") == 0, run.err
    assert not any("vision" in path for path in run.result()["active_rank"])
    assert len(run.result()["active_rank"]) == 2 * (7 if targets == "all-linear" else 2)
    restored = restore(run.folders()[0])
    assert list(restored.layers) == list(run.result()["active_rank"])
    assert run(*model, *data, "targets=[fc1]") == 1
    assert "takes no part in what this model makes of a text" in run.err


def test_a_layer_narrower_than_the_rank(run, tmp_path):
    """Qwen2-MoE's gate of the shared expert is 1 x h."""
    model = saved(tmp_path / "qwen", "qwen2_moe", **EXPERTS, num_key_value_heads=2,
                  shared_expert_intermediate_size=8)  # fmt: skip
    assert run(*model, "partial=true", "rank=4", "alpha=12") == 0, run.err
    gate = "model.layers.*.mlp.shared_expert_gate is 1 x 16: its rank is 1, not 4."
    assert run.out.count(gate) == 1
    assert run.result()["effective_scale"] == 3.0
    assert run.result()["active_rank"]["model.layers.0.mlp.shared_expert_gate"] == 1
    assert run(*model, "rank=4", "targets=[shared_expert_gate]") == 1
    assert "rank is 4; model.layers.0.mlp.shared_expert_gate is 1 x 16" in run.err


def test_a_run_ends_at_an_adapter_that_nothing_calls(run, tmp_path, monkeypatch):
    """As it would where a model cannot be given a text to see what it passes through."""
    monkeypatch.setattr(passes, "_reached", lambda model: None)
    folder = tmp_path / "gemma"
    multimodal(259 + 8).save_pretrained(folder)
    tiny.byte_tokenizer("llama").save_pretrained(folder)
    data = write_language_task(tmp_path)[1:]
    model = ["model=hf", f"model.name={folder}", "model.dtype=float32", "partial=true"]
    assert run(*model, *data, "train.steps=3", "train.eval_every=3") == 1
    assert re.search(r"(vision|multi_modal)\S+ got no gradient in \d+ of \d\d adapters", run.err)
    assert run.result()["status"] == "failed"
