"""Memory: estimates against measured peaks and against a sum by hand, streamed weights, advice."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapters import config_of
from architectures import EXPERTS, causal, classifier
from transformers import LlamaConfig, LlamaForCausalLM

import train
from harness.config import build
from harness.config.overrides import check_command_line
from harness.loop import meter
from harness.memory import __main__ as memory
from harness.memory import advice, estimate
from harness.memory.estimate import BatchShape, Estimator, _kind
from harness.models import tiny
from harness.models.streamed import StreamedLinear
from harness.tasks.batch import Batch
from harness.tasks.language import token_losses
from variants import begin_step

ROOT = Path(__file__).parent.parent


def llama(monkeypatch, **changes):
    """model=tiny_llama with another configuration."""
    real = tiny.tiny_config

    def changed(architecture, vocab_size, sizes):
        return real(architecture, vocab_size, changes)

    monkeypatch.setattr(tiny, "tiny_config", changed)


# ---- the estimate -------------------------------------------------------------------------------


def test_a_layer_keeps_what_a_sum_by_hand_says(monkeypatch):
    b, t, h, m, d, a, c, r = 3, 50, 36, 67, 10, 4, 2, 8
    n, peaks = b * t, []
    for layers in (4, 5):
        llama(monkeypatch, num_hidden_layers=layers)
        config = config_of("model=tiny_llama", f"rank={r}")
        peaks.append(Estimator(config, None).at(BatchShape(b, t, padded=False)).activations_bytes)
        monkeypatch.undo()
    norms = 2 * n * (h + 1 + h)  # input, 1 / RMS, output: the input of what follows
    attention = n * d * (2 * a + 2 * c) + n * a  # q, output; k, v; log-sum-exp
    mlp = 4 * n * m  # gate, SiLU(gate), up, their product
    assert peaks[1] - peaks[0] == 4 * (norms + attention + mlp + 7 * r * n)


@pytest.mark.parametrize("name", ["lora", "full", "qdora"])
@pytest.mark.parametrize("tokens", [3, 60])  # the peak is at the bottom block, at the top one
def test_alike_blocks_need_not_all_be_walked_through(monkeypatch, name, tokens):
    llama(monkeypatch, num_hidden_layers=5)
    config = config_of("model=tiny_llama", f"variant={name}", "train.accumulation=2")
    shape = BatchShape(2, tokens)
    short = Estimator(config, None).at(shape)
    monkeypatch.setattr("harness.memory.estimate._kind", id)  # none is like another
    assert short == Estimator(config, None).at(shape)


def test_blocks_that_differ_are_told_apart():
    model = tiny.outline(labels=None, architecture="llama").model
    one, other = model.model.layers
    assert _kind(one) == _kind(other)
    other.mlp.up_proj.weight.requires_grad_(False)
    assert _kind(one) != _kind(other)


def measured(config, rows, tokens, *, padded=False):
    """The peak of tensors in the second step of training on random tokens, none of it padded unless
    asked for."""
    base = build.load_base(config, None)
    variant = build.make_variant(config)
    layers = build.adapt(base, variant, config)
    model = base.model.train()
    groups = variant.groups(model, lr=1e-3)
    optimizer = build.make_factory(config, "optimizer", "params")(groups)
    ids = torch.randint(3, 250, (rows, tokens))
    mask = torch.ones_like(ids)
    if padded:
        mask[1:, tokens // 2 :] = 0
    batch = Batch({"input_ids": ids, "attention_mask": mask}, ids, (0,) * rows, ids.numel())

    def step():
        begin_step(layers, 1)
        token_losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for layer in layers.values():
            layer.masks = None  # what was made before is not counted when it is let go

    if config["train"]["activation_checkpointing"]:
        from harness.models.base import enable_activation_checkpointing

        enable_activation_checkpointing(model)
    step()
    held = meter.tensor_bytes(model, optimizer)
    return held + meter.peak_tensor_bytes(step)


SIZES = {
    "small": ({"hidden_size": 48, "num_hidden_layers": 3}, 2, 40),
    "large": ({"hidden_size": 192, "intermediate_size": 500, "num_hidden_layers": 6}, 4, 128),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "overrides",
    [
        ["variant=lora"],
        ["variant=dora", "train.activation_checkpointing=true"],
        ["variant=full", "optimizer=sgd"],
        ["variant=qlora"],
        ["variant=lora", "model.dtype=bfloat16", "train.compute_dtype=bfloat16"],
        ["variant=lora", "dropout=0.1"],
        [
            "variant=qlora",
            "dropout=0.1",
            "train.activation_checkpointing=true",
            "model.dtype=bfloat16",
            "train.compute_dtype=bfloat16",
        ],
        ["variant=dora", "dropout=0.1", "variant.adapter.magnitude_dropout=true"],
    ],
    ids=" ".join,
)
def test_the_estimate_is_within_15_percent_of_the_peak(monkeypatch, size, overrides):
    changes, rows, tokens = SIZES[size]
    llama(monkeypatch, **changes)
    config = config_of("model=tiny_llama", *overrides)
    expected = Estimator(config, None).at(BatchShape(rows, tokens, padded=False))
    assert expected.total_bytes == pytest.approx(measured(config, rows, tokens), rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_knows_the_mask_of_padded_rows(monkeypatch, checkpointing):
    """Rows so long that masks are most of it."""
    llama(monkeypatch, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
          num_attention_heads=2, num_key_value_heads=1, head_dim=8)  # fmt: skip
    given = f"train.activation_checkpointing={checkpointing}"
    estimator = Estimator(config := config_of("model=tiny_llama", given), None)
    found = measured(config, 4, 500, padded=True)
    plain, expected = (
        estimator.at(BatchShape(4, 500, padded=padded)).total_bytes for padded in (False, True)
    )
    assert expected == pytest.approx(found, rel=0.15)
    assert plain != pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("kind", ["mixtral", "opt"])  # experts; a mask of tokens alone
@pytest.mark.parametrize("padded", [False, True])
def test_the_estimate_of_another_architecture(tmp_path, kind, padded):
    tokenizer = tiny.byte_tokenizer("llama")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 48, "max_position_embeddings": 300}
    more = {
        "mixtral": {**EXPERTS, "num_key_value_heads": 2},
        "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48},
    }
    causal(kind, **sizes, **more[kind]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = config_of("model=hf", f"model.name={tmp_path}", "partial=true")
    expected = Estimator(config, None).at(BatchShape(3, 64, padded=padded)).total_bytes
    assert expected == pytest.approx(measured(config, 3, 64, padded=padded), rel=0.15)


def test_a_model_that_asks_for_values_has_no_estimate(tmp_path, monkeypatch):
    """XLNet's code makes tensors on the CPU, whatever its device is."""
    config = classifier("xlnet", d_model=16, n_layer=2, n_head=2, d_inner=24,
                        max_position_embeddings=None).config  # fmt: skip
    config.save_pretrained(tmp_path)
    config = config_of("model=hf", f"model.name={tmp_path}")
    with pytest.raises(ValueError, match="memory of xlnet cannot be estimated, since its code"):
        Estimator(config, ("a", "b")).at(BatchShape(2, 8))
    monkeypatch.setattr(estimate, "WORTH_ESTIMATING", 0)
    plan = estimate.Plan(config, SimpleNamespace(max_tokens=8, labels=("a", "b")))
    assert plan.describe().startswith("memory: the memory of xlnet cannot be estimated")
    assert plan.total_bytes((2, 8)) is None


RESIDENT = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from adapters import config_of
from test_memory import measured
from harness.config import build
from harness.loop import meter
from harness.memory.estimate import BatchShape, Estimator
torch.set_num_threads(1)
folder, *overrides = sys.argv[2:]
config = config_of("model=hf", f"model.name={folder}", *overrides)
expected = Estimator(config, None).at(BatchShape(4, 256, padded=False)).total_bytes
start, reset = meter._resident_bytes("VmRSS"), meter._reset_resident_peak()
measured(config, 4, 256)
print(json.dumps([expected, meter._resident_bytes("VmHWM") - start, reset]))
"""


def in_a_process(script, *arguments):
    """Returns the JSON that a script prints; it must not inherit this process's memory. glibc gives
    back what is freed at once: as it comes it keeps a quarter more than the tensors need."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(ROOT / "tests"), *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=550,
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def write_llama(folder, *, shards="5GB", **changes):
    """A random Llama with the tokenizer of model=tiny_llama, as a folder."""
    tokenizer = tiny.byte_tokenizer("llama")
    config = tiny.tiny_config("llama", len(tokenizer)).to_dict() | changes
    config.pop("layer_types", None)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder, max_shard_size=shards)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [512, 768, 1024])
def test_the_resident_set_is_within_15_percent_too(tmp_path, hidden):
    changes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 6}
    folder = write_llama(tmp_path / "llama", **changes)
    expected, resident, reset = in_a_process(RESIDENT, folder)
    if not reset:
        pytest.skip("this machine does not let a process reset its peak")
    assert expected == pytest.approx(resident, rel=0.15)


# ---- streamed weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [None, ("a", "b")], ids=["language model", "classifier"])
@pytest.mark.parametrize(
    "overrides", [["variant=qlora"], ["variant=qdora", "targets=[q_proj]"]], ids=" ".join
)
def test_a_streamed_base_is_the_same_base(tmp_path, labels, overrides):
    folder = write_llama(tmp_path / "llama", shards="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    config = config_of("model=hf", f"model.name={folder}", "model.dtype=bfloat16", *overrides)
    whole, streamed = (build.load_base(config, labels, streamed=s) for s in (False, True))
    on_disk = [m for m in streamed.model.modules() if isinstance(m, StreamedLinear)]
    assert len(on_disk) == 14 and all(layer.weight.is_meta for layer in on_disk)
    assert whole.sha256 == streamed.sha256
    ids = torch.arange(5, 45).view(2, 20)

    def logits(base):
        with torch.no_grad():
            return base.model(input_ids=ids).logits

    assert torch.equal(logits(whole), logits(streamed))
    for base in (whole, streamed):
        build.adapt(base, build.make_variant(config), config)
    assert torch.equal(logits(whole), logits(streamed))
    pairs = zip(whole.model.named_parameters(), streamed.model.named_parameters(), strict=True)
    for (name, one), (other_name, other) in pairs:
        assert (name, one.dtype, one.requires_grad) == (
            other_name, other.dtype, other.requires_grad,
        )  # fmt: skip
        assert torch.equal(one, other)


STREAMED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from adapters import config_of
from harness.config import build
from harness.loop import meter
folder, streamed = sys.argv[2], sys.argv[3] == "True"
config = config_of("model=hf", f"model.name={folder}", "variant=qlora")
start, reset = meter._resident_bytes("VmRSS"), meter._reset_resident_peak()
base = build.load_base(config, None, streamed=streamed)
build.adapt(base, build.make_variant(config), config)
print(json.dumps([meter._resident_bytes("VmHWM") - start, reset]))
"""


@pytest.mark.slow
def test_a_streamed_model_is_never_held_whole(tmp_path):
    changes = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12}
    folder = write_llama(tmp_path / "llama", shards="50MB", **changes)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    peaks = {}
    for streamed in (False, True):
        peaks[streamed], reset = in_a_process(STREAMED, folder, streamed)
        if not reset:
            pytest.skip("this machine does not let a process reset its peak")
    assert peaks[False] > size
    assert peaks[True] < 0.4 * size  # an eighth of it as codes, a weight, what Python needs


# ---- the table ----------------------------------------------------------------------------------


@pytest.fixture
def llama_folder(tmp_path):
    """config.json alone, of a Llama of 1.2 billion parameters."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=4096,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    return tmp_path


def test_the_table_needs_a_configuration_alone(llama_folder):
    shown = memory.table(
        ["model=hf", f"model.name={llama_folder}", "train.batch_size=1", "task.max_tokens=64,8192",
         "variant=full,lora,qlora"]
    )  # fmt: skip
    lines = [line.split() for line in shown.splitlines()]
    assert "1.1B parameters in bfloat16" in shown
    assert "8192 tokens" not in shown  # more than the model has positions
    full, plain, quantised = lines[-3:]
    weights = 32000 * 2048 * 2 + 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192)
    assert float(plain[1]) == pytest.approx(2 * weights / 1e9, rel=0.01)
    assert float(full[-2]) > float(plain[-2]) > float(quantised[-2])
    assert float(full[3]) == pytest.approx(8 * (weights - 32000 * 2048 * 2) / 1e9, rel=0.01)
    assert quantised[-1] == "(8)"


def test_a_later_microstep_finds_the_gradients_of_the_first():
    """At the top of the forward pass, where a first microstep has none yet."""
    found = {}
    for microsteps in (1, 2, 5):
        config = config_of("model=tiny_llama", f"train.accumulation={microsteps}")
        estimator = Estimator(config, None)
        found[microsteps] = estimator.at(BatchShape(4, 200))
        trained = 4 * sum(parameter.numel() for parameter in estimator._trained)
    assert found[1].gradients_bytes < found[2].gradients_bytes == trained
    assert found[5] == found[2] and found[2].total_bytes > found[1].total_bytes


def test_a_plan_is_for_padded_rows_unless_there_is_one():
    plan, shapes = estimate.Plan.__new__(estimate.Plan), []
    plan._estimator = SimpleNamespace(at=shapes.append)
    for rows in (4, 1):
        plan.at(rows, 500)
    assert shapes == [BatchShape(4, 500, padded=True), BatchShape(1, 500, padded=False)]


def test_the_smallest_card(monkeypatch):
    assert [memory.card(int(gb * 1e9)) for gb in (1, 6.9, 7, 75, 76, 133, 134)] == [
        8, 8, 16, 80, 141, 141, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model"], "'model' is not an override; write key=value"),
        (["model=hff"], "there is no model=hff"),
        (["variant=lorra"], "Did you mean lora?"),
        (["model=tiny_llama", "rnak=4"], "Did you mean rank?"),
        (["model=tiny_llama", "train.batch_size=none"], "must be a positive whole number"),
        (["model=tiny_llama", "variant=lora", "task.max_tokens=4000"], "has 300 positions"),
        (["model=hf"], "needs model.name"),
        (["model=hf", "model.name=./nowhere"], "no such folder"),
        (["model=tiny_llama", "targets=[q_prj]"], "matches no layer"),
    ],
)
def test_a_mistake_is_one_sentence(monkeypatch, capsys, arguments, expected):
    monkeypatch.setattr(sys, "argv", ["memory", *arguments])
    with pytest.raises(SystemExit) as stop:
        memory.main()
    message = str(stop.value)
    assert message.startswith("error: ") and expected in message and "\n" not in message


# ---- out of memory ------------------------------------------------------------------------------


def test_out_of_memory_names_four_overrides_and_their_effect(monkeypatch, tmp_path, capsys):
    from command import CommandLine

    cli = CommandLine(tmp_path, monkeypatch, capsys)

    def none_left(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("harness.loop.step.training_step", none_left)
    assert cli("variant=lora", "tracking=none") == 1
    first, *effects = cli.err.strip().splitlines()
    assert first.startswith("error: cpu is out of memory. For 4 rows of 40 tokens a step needs")
    assert len(effects) == 4 and all(line.endswith(" less") for line in effects)
    named = {part.partition("=")[0] for line in effects for part in line.split() if "=" in part}
    assert {"train.batch_size", "train.accumulation", "task.max_tokens"} <= named
    for line in effects:  # each is an override that train.py takes
        parts = [part for part in line.split() if "=" in part]
        assert check_command_line(parts, train.CONF)


def test_other_errors_are_not_taken_for_it():
    assert not advice.is_out_of_memory(RuntimeError("shapes do not fit"))
    assert advice.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))


# ---- optimisers, dtypes, recomputation ----------------------------------------------------------


def test_paged_adamw_needs_a_gpu():
    factory = build.make_factory(config_of("optimizer=paged_adamw"), "optimizer", "params")
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"is on the CPU; use optimizer=adamw"):
        factory([{"params": [parameter], "lr": 1e-3}])


@pytest.mark.gpu
def test_paged_adamw_steps_as_adamw():
    values = []
    for name in ("adamw", "paged_adamw"):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 5000, device="cuda"))
        factory = build.make_factory(config_of(f"optimizer={name}"), "optimizer", "params")
        optimizer = factory([{"params": [parameter], "lr": 1e-2, "weight_decay": 0.1}])
        for _ in range(5):
            parameter.grad = parameter.detach().sin()
            optimizer.step()
        values.append(parameter.detach().cpu())
    assert torch.allclose(*values, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["dora", "qlora"])
def test_recomputed_activations_give_the_same_gradients(name, dtype):
    """Of a language model with dropout: the masks are drawn again, and are the same."""

    def gradients(checkpointing):
        config = config_of("model=tiny_llama", f"variant={name}", "dropout=0.2",
                           f"model.dtype={dtype}", f"train.compute_dtype={dtype}")  # fmt: skip
        base = build.load_base(config, None)
        layers = build.adapt(base, build.make_variant(config), config)
        if checkpointing:
            from harness.models.base import enable_activation_checkpointing

            enable_activation_checkpointing(base.model)
        trained = {n: p for n, p in base.model.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trained.values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        ids = torch.arange(5, 65).view(2, 30)
        batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, (0, 1), 60)
        base.model.train()
        begin_step(layers, 3)
        token_losses(base.model, batch).mean().backward()
        frozen = {p.dtype for p in base.model.parameters() if not p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert getattr(torch, dtype) in frozen
        return {n: p.grad for n, p in trained.items()}

    plain, recomputed = gradients(False), gradients(True)
    assert all(torch.equal(plain[n], recomputed[n]) for n in plain)
    assert max(float(g.abs().max()) for g in plain.values()) > 1e-4
    assert {g.dtype for g in plain.values()} == {torch.float32}
