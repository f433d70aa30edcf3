"""float16: the loss is scaled as torch.amp.GradScaler scales it, and a card without bfloat16."""

import copy
import functools
import json
import math
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from adapters import config_of
from command import CommandLine
from safetensors.torch import load_file
from torch import nn
from torch.amp import GradScaler

import harness.loop.step
import variants
from harness.config import build, identity
from harness.disk.digest import digest
from harness.loop.step import NonFiniteLoss, training_step

HALF = ["train.compute_dtype=float16", "model.dtype=float16"]
SCALER = functools.partial(GradScaler, "cpu", init_scale=2.0**6, growth_interval=3)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


class Rows:
    """A batch whose loss is `size` times the mean of squares, in float16 products."""

    learned = n_tokens = 8

    def __init__(self, number: int, size: float = 1.0):
        generator = torch.Generator().manual_seed(number)
        self.inputs = {"input_ids": torch.randn(8, 12, generator=generator)}
        self.labels, self.size = torch.zeros(8), size

    def to(self, device):
        return self

    @staticmethod
    def loss(model, batch):
        return batch.size * model(batch.inputs["input_ids"]).square().mean()


def adapted(dtype=torch.float16, **given):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5))
    adapter = partial(variants.LoraLinear, rank=2, alpha=4, init_B="kaiming")
    variant = variants.Variant(name="x", lr=0.05, adapter=adapter, groups=variants.by_role, **given)
    layers = variants.inject(model, variant, seed=0, compute_dtype=dtype)
    optimizer = torch.optim.AdamW(variant.groups(model, lr=0.05))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return model, layers, variant, optimizer


def stepping(model, layers, variant, optimizer, **given):
    return partial(
        training_step, model=model, layers=layers, variant=variant, optimizer=optimizer,
        allocator=None, loss=Rows.loss, device=torch.device("cpu"), seed=0, rate_factor=1.0,
        clip_norm=0.1, **given,
    )  # fmt: skip


def parameters_of(optimizer):
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def test_steps_and_scale_are_those_of_torchs_own_loop():
    """Unscaled before clipping, over two microsteps, with overflows in steps 2, 3 and 9."""
    parts, others = adapted(), adapted()
    scaler, reference = SCALER(), SCALER()
    take_step = stepping(*parts, accumulation=2, scaler=scaler)
    model, _, _, optimizer = others
    overflowed, clipped = [], 0
    for step in range(1, 13):
        size = {2: 1e4, 3: 1e4, 9: 1e5}.get(step, 1.0)
        rows = [Rows(2 * step, size), Rows(2 * step + 1)]
        done = take_step(step, batches=iter(rows))
        for batch in rows:
            reference.scale(Rows.loss(model, batch) * 0.5).backward()
        reference.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters_with_grad(optimizer), 0.1)
        reference.step(optimizer)
        reference.update()
        optimizer.zero_grad(set_to_none=True)
        assert scaler.state_dict() == reference.state_dict(), step
        assert done.overflowed == (not math.isfinite(norm)) and math.isfinite(done.loss_nats)
        overflowed += [step] * done.overflowed
        clipped += done.grad_norm > 0.1
        for one, other in zip(parameters_of(parts[3]), parameters_of(optimizer), strict=True):
            assert torch.equal(one, other), step
    assert overflowed == [2, 3, 9] and clipped
    assert scaler.get_scale() == 2.0**6 / 4 * 2 / 2 * 2  # two back, one up, one back, one up
    state = scaler.state_dict()
    assert state["_growth_tracker"] == 0


def parameters_with_grad(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_a_gradient_that_float16_cannot_hold_is_kept_by_the_scale():
    """Against float64; without a scale it is 0."""
    found = {}
    for name, scaler in (("plain", GradScaler(enabled=False)), ("scaled", GradScaler("cpu"))):
        parts = adapted()
        stepping(*parts, scaler=scaler)(1, batches=iter([Rows(1, 1e-7)]))
        found[name] = [float(s["exp_avg"].norm()) for s in parts[3].state.values()]
    exact = copy.deepcopy(adapted(torch.float64)[0])
    Rows.loss(exact, Rows(1, 1e-7)).backward()
    expected = [0.1 * float(p.grad.norm()) for p in exact.parameters() if p.grad is not None]
    assert sorted(found["scaled"]) == pytest.approx(sorted(expected), rel=0.01)
    assert max(found["plain"]) < 0.5 * max(expected)


def test_an_overflow_leaves_all_but_the_scale_and_is_no_divergence():
    calls = []

    class Recorder(variants.LoraLinear):
        def after_step(self, step):
            calls.append(step)

    model, layers, variant, optimizer = adapted()
    for layer in layers.values():
        layer.__class__ = Recorder
    before = [p.clone() for p in parameters_of(optimizer)]
    scaler = SCALER()
    done = stepping(model, layers, variant, optimizer, scaler=scaler)(
        1, batches=iter([Rows(1, 1e4)])
    )
    assert done.overflowed and scaler.get_scale() == 2.0**5 and not calls and not optimizer.state
    assert all(map(torch.equal, before, parameters_of(optimizer)))
    assert all(p.grad is None for p in parameters_with_grad(optimizer))


def test_what_no_scale_mends_is_a_divergence():
    """A loss that is not finite at once; a gradient, when the scale has come down to 1."""
    scaler = GradScaler("cpu", init_scale=4.0)
    take_step = stepping(*adapted(), scaler=scaler)
    assert [take_step(n, batches=iter([Rows(n, 1e38)])).overflowed for n in (1, 2)] == [True] * 2
    with pytest.raises(NonFiniteLoss, match="diverged at step 3"):
        take_step(3, batches=iter([Rows(3, 1e38)]))
    take_step = stepping(*adapted(), scaler=GradScaler("cpu"))
    with pytest.raises(NonFiniteLoss, match="diverged at step 1: loss nan"):
        take_step(1, batches=iter([Rows(1, math.nan)]))
    assert not take_step(2, batches=iter([Rows(2)])).overflowed  # it may be skipped


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_task_is_solved_in_float16():
    """The answer is 0 for every input."""
    parts = adapted()
    take_step = stepping(*parts, scaler=GradScaler("cpu"))
    losses = [
        take_step(n, batches=iter([Rows(n % 4)])).loss_nats for n in range(1, 151)
    ]  # fmt: skip
    assert losses[-1] < 1e-2 * losses[0]


def test_a_run_in_float16_is_that_in_float32_but_for_rounding(cli):
    run = ["variant=dora", "variant.lr=0.01", "train.log_every=1"]
    folders = {name: cli.root / name for name in ("float16", "float32")}
    assert cli(*run, *HALF, f"run_dir={folders['float16']}") == 0, cli.err
    assert cli(*run, f"run_dir={folders['float32']}") == 0, cli.err
    losses = [[row["train/loss_nats"] for row in rows_of(f)] for f in folders.values()]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3) and losses[0] != losses[1]
    half, whole = (cli.result(folder) for folder in folders.values())
    assert half["overflowed_steps"] == half["skipped_steps"] == 0 and half["loss_scale"] == 2.0**16
    assert "loss_scale" not in whole and "overflowed_steps" not in whole
    assert half["memory"]["base_bytes"] < 0.6 * whole["memory"]["base_bytes"]


def test_an_interrupted_run_in_float16_continues_bit_for_bit(cli, monkeypatch):
    """With overflows before it is killed, and a scale that has grown again."""
    scaler = partial(GradScaler, init_scale=2.0**26, growth_interval=3)
    monkeypatch.setattr(build.torch.amp, "GradScaler", scaler)
    run = ["variant=adalora_budget", *HALF, "train.steps=12", "train.log_every=1"]
    whole, parts = cli.root / "whole", cli.root / "parts"
    assert cli(*run, f"run_dir={whole}") == 0, cli.err
    real = harness.loop.step.training_step

    def interrupted(step, **arguments):
        if step > 9:
            raise KeyboardInterrupt
        return real(step, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(harness.loop.step, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cli(*run, f"run_dir={parts}")
    assert cli(*run, f"run_dir={parts}") == 0, cli.err
    for one, other in zip(rows_of(whole), rows_of(parts), strict=True):
        assert all(one[key] == other[key] for key in one if not key.startswith("time/"))
    tensors = [load_file(folder / "adapter/native.safetensors") for folder in (whole, parts)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    results = [cli.result(folder) for folder in (whole, parts)]
    assert results[0]["overflowed_steps"] == results[1]["overflowed_steps"] >= 2
    assert results[0]["loss_scale"] == results[1]["loss_scale"]
    scales = [row["train/loss_scale"] for row in rows_of(whole)]
    assert any(b > a for a, b in pairwise(scales)) and "overflowed" in cli.out
    assert cli(*run, "dry_run=true") == 0, cli.err


TWO = """
import sys
import torch
sys.path[:0] = {paths!r}
from test_float16 import SCALER, Rows, adapted, parameters_of, stepping
from harness.machine import distributed
import harness.loop.step as step_module
distributed.begin("ddp", batch_size=2, device="cpu", compiled=False)
step_module.own_part = lambda batch: batch  # each has its own
parts, scaler = adapted(), SCALER()
found = []
for step in range(1, 6):
    size = 1e4 if step == 2 and distributed.rank() == 1 else 1.0
    rows = Rows(2 * step + distributed.rank(), size)
    done = stepping(*parts, scaler=scaler)(step, batches=iter([rows]))
    found.append([done.overflowed, scaler.get_scale(), float(parameters_of(parts[3])[0].sum())])
both = distributed.gather(found)
assert both[0] == both[1], both
assert [row[0] for row in found] == [False, True, False, False, False], found
assert [row[1] for row in found] == [64, 32, 32, 32, 64], found
distributed.end()
"""


@pytest.mark.long
def test_an_overflow_of_one_process_is_one_of_all(tmp_path):
    tests = Path(__file__).parent
    (tmp_path / "two.py").write_text(TWO.format(paths=[str(tests), str(tests.parent)]))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "two.py")], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def a_card(monkeypatch, capability, name="Tesla T4"):
    """Stand-ins for what torch says of a CUDA device."""
    for function, value in {
        "is_available": True, "device_count": 1, "get_device_name": name,
        "get_device_capability": capability, "is_bf16_supported": True,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)


@pytest.mark.parametrize(
    ("capability", "asked", "given"),
    [
        ((7, 5), ("bfloat16", "bfloat16"), ("float16", "float16")),
        ((7, 5), ("bfloat16", "float32"), ("float16", "float32")),
        ((7, 0), ("float32", "float32"), ("float32", "float32")),
        ((8, 0), ("bfloat16", "bfloat16"), ("bfloat16", "bfloat16")),
    ],
)
def test_a_card_without_bfloat16_computes_in_float16(monkeypatch, capability, asked, given):
    a_card(monkeypatch, capability)
    keys = ("train.compute_dtype", "model.dtype")
    wanted = [f"{key}={value}" for key, value in zip(keys, asked, strict=True)]
    config = config_of("variant=lora", "train.device=auto", *wanted)
    settings = build.settle(config, variant=config["variant"], overridden=[])
    assert settings.dtypes == given and settings.device.type == "cuda"
    changed = [key for key, a, b in zip(keys, asked, given, strict=True) if a != b]
    sentence = f"Tesla T4 has no bfloat16: {' and '.join(changed)} is float16"
    assert len(settings.notes) == bool(changed)
    assert all(note.startswith(sentence) for note in settings.notes)
    same = identity.run_key(config_of("variant=lora", *wanted, "train.device=cuda:0"))
    assert bool(changed) == (identity.run_key(settings.config) != same) or not changed


def test_a_base_in_float16_was_trained_without_a_scale_once():
    for dtype, same in (("float32", True), ("bfloat16", True), ("float16", False)):
        config = config_of(f"model.dtype={dtype}")
        assert (identity.run_key(config) == digest(identity.irrelevant_removed(config))) == same
