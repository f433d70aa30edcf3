"""A run that was cut off goes on from what it kept, and what was damaged is not trusted."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
from command import CommandLine
from test_train import comparable, same_adapter

import harness.step

RUN = ["variant=lora", "variant.lr=0.01", "dropout=0.1"]  # 8 steps, a checkpoint at every second


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a whole run's folder, the same run's cut off in step 7, the overrides of both)."""
    root = tmp_path_factory.mktemp("made")
    real = harness.step.training_step

    def interrupted(step, **arguments):
        if step == 7:
            raise KeyboardInterrupt
        return real(step, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        run = CommandLine(root, patch, SimpleNamespace(readouterr=lambda: ("", "")))
        assert run(*RUN, f"run_dir={root / 'whole'}") == 0
        patch.setattr(harness.step, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(*RUN, f"run_dir={root / 'parts'}")
        return root / "whole", root / "parts", [*run.defaults, *RUN]


@pytest.fixture
def cut_off(cli, made):
    """(the whole run's folder, a copy of the other, its checkpoints of steps 4 and 6, a function
    that goes on with it)."""
    whole, begun, overrides = made
    parts = cli.root / "parts"
    shutil.copytree(begun, parts)
    kept = sorted((parts / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-00000004", "step-00000006"]

    def go_on() -> None:
        assert cli.exactly(*overrides, f"run_dir={parts}") == 0, cli.err
        assert comparable(whole) == comparable(parts)
        same_adapter(whole, parts)

    return parts, kept, go_on


def flip(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit of a tensor": lambda kept: flip(kept / "tensors.safetensors", -1),
    "a bit of the header": lambda kept: flip(kept / "tensors.safetensors", 12),
    "a cut file": lambda kept: (kept / "tensors.safetensors").write_bytes(b"\x08"),
    "an edited state": lambda kept: (kept / "state.json").write_text("{}"),
    "a missing state": lambda kept: (kept / "state.json").unlink(),
    "missing digests": lambda kept: (kept / "digests.json").unlink(),
    "digests that are none": lambda kept: (kept / "digests.json").write_text("[]"),
    "digests in no code": lambda kept: (kept / "digests.json").write_bytes(b"\xff{"),
    "an empty folder": lambda kept: [file.unlink() for file in kept.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_costs_steps_and_not_the_run(cli, cut_off, damage):
    parts, (_, newest), go_on = cut_off
    damage(newest)
    go_on()
    assert f"Warning: {newest} is damaged" in cli.err and cli.err.count("\n") == 1
    assert f"continuing {parts} after step 4" in cli.out


def test_without_a_whole_checkpoint_a_run_starts_anew(cli, cut_off):
    _, kept, go_on = cut_off
    for path in kept:
        flip(path / "tensors.safetensors", -1)
    go_on()
    assert cli.err.count("is damaged") == 2 and "continuing" not in cli.out


def test_what_a_killed_process_was_writing_is_no_checkpoint(cli, cut_off):
    parts, (_, newest), go_on = cut_off
    half = parts / "checkpoints" / ".step-00000008.123"
    shutil.copytree(newest, half)
    (half / "tensors.safetensors").write_bytes(b"half")
    go_on()
    assert "damaged" not in cli.err and "after step 6" in cli.out
    assert not (parts / "checkpoints").exists()


def test_a_checkpoint_of_another_version_is_refused_and_can_be_left(cli, cut_off, made):
    parts, kept, _ = cut_off
    for path in kept:
        state = json.loads((path / "state.json").read_text())
        del state["format"], state["hooks"]  # as before hooks were counted
        (path / "state.json").write_text(json.dumps(state))
        digests = json.loads((path / "digests.json").read_text())
        digests["state.json"] = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
        (path / "digests.json").write_text(json.dumps(digests))
    overrides = [*made[2], f"run_dir={parts}"]
    assert cli.exactly(*overrides) == 1
    assert cli.err == (
        f"error: {kept[-1]} was written by another version of this project, which cannot go on "
        "from it; force=true starts the run anew.\n"
    )
    assert cli.exactly(*overrides, "force=true") == 0 and "continuing" not in cli.out
    assert comparable(made[0]) == comparable(parts)
