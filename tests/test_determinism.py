"""`python -m harness.loop.repeat`: two runs that are equal, and every way to differ, named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import CommandLine, write_task
from safetensors.torch import load_file, save_file

from harness.loop.repeat import first_difference

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with all its checkpoints."""
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        cli = CommandLine(root, patch, SimpleNamespace(readouterr=lambda: ("", "")))
        kept = ("train.checkpoint_every=1", "train.keep_checkpoints=null", "train.log_every=1")
        assert cli("variant=dora", "train.steps=4", *kept, f"run_dir={root / 'one'}") == 0
    assert len(list((root / "one/checkpoints").iterdir())) == 3
    return root / "one"


def change_tensor(path, name: str, by: float) -> None:
    tensors = load_file(path)
    tensors[name].view(-1)[0] += by
    save_file(tensors, path)


def edit(path, before: str, after: str) -> None:
    path.write_text(path.read_text().replace(before, after, 1))


def drop_line(path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


A = "bert.pooler.dense.A"
CHANGES = {
    f"step 2: model/{A} differs in 1 of 288 values, by 0.5": lambda run: change_tensor(
        run / "checkpoints/step-00000002/tensors.safetensors", f"model/{A}", 0.5
    ),
    f"after the last step: {A} differs in 1 of 288 values, by 0.25": lambda run: change_tensor(
        run / "adapter/native.safetensors", A, 0.25
    ),
    "step 3: the second run has no checkpoint of it": lambda run: shutil.rmtree(
        run / "checkpoints/step-00000003"
    ),
    "metrics.jsonl: 4 rows and 3": lambda run: drop_line(run / "metrics.jsonl"),
    "predictions.jsonl, line 1: loss_nats differs": lambda run: edit(
        run / "predictions.jsonl", '"loss_nats": 0.', '"loss_nats": 9.'
    ),
}


@pytest.mark.parametrize("said", CHANGES)
def test_the_first_difference_is_named(run, tmp_path, said):
    shutil.copytree(run, tmp_path / "other")
    assert first_difference(run, tmp_path / "other") is None
    CHANGES[said](tmp_path / "other")
    assert first_difference(run, tmp_path / "other") == said


def test_an_earlier_difference_comes_before_a_later_one(run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    for said in CHANGES:
        if "second run" not in said:
            CHANGES[said](tmp_path / "other")
    assert first_difference(run, tmp_path / "other").startswith("step 2: ")
    state = tmp_path / "other/checkpoints/step-00000001/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "skipped": [1]}))
    assert first_difference(run, tmp_path / "other") == "step 1: skipped differs"


def check(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "harness.loop.repeat", "model=tiny", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_run_is_a_function_of_its_configuration(tmp_path):
    small = ["train.batch_size=4", "train.threads=1", "dropout=0.1", *write_task(tmp_path)]
    done = check("variant=adalora", "train.steps=6", "variant.allocator.interval=1", *small)
    assert done.returncode == 0, done.stderr
    assert "adalora on tiny-bert, seed 0, 6 steps, twice" in done.stdout
    assert "1 threads" in done.stdout and "equal to the bit" in done.stdout
    done = check("rank=-1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the first run failed: error: rank is -1")
