"""Files that the commit 436465e made, before the modules moved: continued, read and restored.

earlier/keys.json          run key and control hash of what conf/ offers
earlier/unfinished/        a run that was killed after step 6 of 10
earlier/finished/          the same run to its end, with its adapter
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from command import CommandLine
from safetensors.torch import load_file

from harness.adapter import evaluate, native
from harness.adapter.restore import restore
from harness.compare.rows import read_folder
from harness.config import build, identity

EARLIER = Path(__file__).parent / "earlier"


@pytest.mark.parametrize("choice", json.loads((EARLIER / "keys.json").read_text()))
def test_a_choice_keeps_its_run_key_and_control_hash(choice):
    config = build.compose(choice.split())
    config["train"] |= {"threads": 2, "device": "cpu"}
    known = json.loads((EARLIER / "keys.json").read_text())
    assert [identity.run_key(config), identity.control_hash(config, {})] == known[choice]


def overrides(folder: Path) -> list[str]:
    """The command line that makes the run again, of its recorded config."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    files = [f"task.files.{split}={file}" for split, file in config["task"]["files"].items()]
    return [
        "model=tiny", "tracking=none", "variant=adalora", "variant.allocator.interval=3", "rank=2",
        "schedule=cosine", "task=local", "task.max_tokens=40", *files, "train.steps=10",
        "train.batch_size=4", "train.eval_every=4", "train.log_every=2", "train.checkpoint_every=3",
        "train.threads=1",
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copytree(EARLIER, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    return tmp_path / "earlier"


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys).exactly


def close_to(scores: dict, earlier: dict) -> None:
    """Equal to the bit on the processor that made them; elsewhere but for rounding."""
    assert scores == pytest.approx(earlier, rel=1e-4)


def test_a_run_is_continued(folder, train, capsys):
    run = [*overrides(folder / "unfinished"), "run_dir=unfinished"]
    assert train(*run) == 1  # the code is another, which the result has to say
    assert train(*run, "train.resume=anyway") == 0
    result, earlier = (
        json.loads((folder / name / "result.json").read_text())
        for name in ("unfinished", "finished")
    )
    assert len(result["sessions"]) == 2
    close_to(result["validation"], earlier["validation"])
    assert (result["run_key"], result["rank_history"]) == (
        earlier["run_key"],
        earlier["rank_history"],
    )
    tensors = [
        load_file(folder / name / "adapter" / native.TENSORS) for name in ("unfinished", "finished")
    ]
    for name, tensor in tensors[1].items():
        torch.testing.assert_close(tensors[0][name], tensor, rtol=1e-3, atol=1e-4)


def test_a_finished_run_is_not_made_again(folder, train):
    before = (folder / "finished/result.json").read_bytes()
    assert train(*overrides(folder / "finished"), "run_dir=finished") == 0
    assert (folder / "finished/result.json").read_bytes() == before


def test_an_archive_is_read(folder):
    run = read_folder(folder / "finished", "adalora", "compare")
    assert run.complete and len(run.curve) == 5 and run.correct is not None


def test_an_adapter_is_restored(folder):
    restored = restore(folder / "finished")
    scores = evaluate.evaluate(restored, "test").metrics
    close_to(scores, json.loads((folder / "finished/result.json").read_text())["test"])
