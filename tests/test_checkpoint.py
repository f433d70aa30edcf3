"""A run that was cut off goes on from what it kept where it was computed, and what was damaged, or
is another run's, is not trusted."""

import ast
import dataclasses
import hashlib
import json
import shutil
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapters import checkpoint_state, config_of
from command import CommandLine
from made_study import made_study
from safetensors.torch import load_file, save_file
from test_reading import cases, is_one_sentence, some, with_value
from test_train import comparable, same_adapter

import harness.loop.step
from harness.compare.analyse import analyse
from harness.compare.rows import read_rows, row
from harness.config import build
from harness.disk import inputs
from harness.loop import checkpoint, laws, meter, sessions
from harness.machine import hardware

RUN = ["variant=lora", "variant.lr=0.01", "dropout=0.1"]  # 8 steps, a checkpoint at every second


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a whole run's folder, the same run's cut off in step 7, the overrides of both)."""
    root = tmp_path_factory.mktemp("made")
    real = harness.loop.step.training_step

    def interrupted(step, **arguments):
        if step == 7:
            raise KeyboardInterrupt
        return real(step, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        run = CommandLine(root, patch, SimpleNamespace(readouterr=lambda: ("", "")))
        assert run(*RUN, f"run_dir={root / 'whole'}") == 0
        patch.setattr(harness.loop.step, "training_step", interrupted)
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


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """(what a run under an allocator would restore, the folder of its checkpoints)."""
    config = config_of("variant=adalora", "targets=[query]")
    variant = build.make_variant(config)
    base = build.load_base(config, build.make(config, "task").labels)
    layers = build.adapt(base, variant, config)
    optimizer = torch.optim.AdamW(variant.groups(base.model, lr=0.1))
    for parameter in next(iter(layers.values())).parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parts = SimpleNamespace(
        model=base.model,
        layers=layers,
        optimizer=optimizer,
        allocator=variant.allocator(layers, total_steps=100, seed=0),
        meter=meter.Meter(base.model, optimizer, torch.device("cpu")),
        hooks=laws.HookCounter(layers, None),
        session=sessions.now(hardware.environment(1, torch.device("cpu"))),
    )
    parts.meter.step_s, parts.meter.step_tokens = [0.5, 0.25], [20, 40]
    parts.meter.peak_shape = (2, 40)
    parts.allocator.lowest_loss_nats = 0.5
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoint.save(
        folder,
        2,
        run={"run_key": "1", "fingerprints": {"data": "x"}},
        model=parts.model,
        layers=layers,
        optimizer=optimizer,
        state={
            **checkpoint_state(),
            "sessions": [{"after_step": 0, **parts.session}],
            "meter": parts.meter.state_dict(),
            "allocator": parts.allocator.state_dict(),
        },
    )
    return parts, folder


def flip(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit_state(kept, **changes) -> None:
    """Change a checkpoint's state, and its digest with it; None removes a key."""
    state = json.loads((kept / "state.json").read_text()) | changes
    removed = {key for key, value in changes.items() if value is None}
    text = json.dumps({key: value for key, value in state.items() if key not in removed})
    (kept / "state.json").write_text(text)
    digests = json.loads((kept / "digests.json").read_text())
    digests["state.json"] = hashlib.sha256(text.encode()).hexdigest()
    (kept / "digests.json").write_text(json.dumps(digests))


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


@some
def test_every_value_of_a_checkpoint_is_held_to_its_kind(step, halfway, tmp_path, capsys):
    """It is restored, passed over or refused, even where its digest is right."""
    parts, folder = halfway
    kept = shutil.copytree(folder, tmp_path / "made") / "step-00000002"
    whole = json.loads((kept / "state.json").read_text())
    restored = 0
    for at, kind in cases(whole)[::step]:
        edit_state(kept, **{"": None, **with_value(whole, at, kind)})
        try:
            state = checkpoint.load(
                kept.parent,
                run=whole["run"],
                model=parts.model,
                layers=parts.layers,
                optimizer=parts.optimizer,
            )
            if state is None:
                assert capsys.readouterr().err.startswith("Warning: "), (at, kind)
                continue
            restored += 1
            parts.meter.load_state_dict(state["meter"])
            parts.hooks.load_state_dict(state["hooks"])
            parts.allocator.load_state_dict(state["allocator"])
            session = whole["sessions"][0]
            sessions.in_result(sessions.continued(state, session, "anyway", kept))
            parts.meter.times(), parts.meter.memory(), parts.allocator.is_due(30)
            parts.allocator.unmet(parts.layers, range(40))
        except ValueError as error:
            assert is_one_sentence(error), (at, kind, error)
    assert restored


def test_a_tensor_that_is_nobodys_is_damage(halfway, tmp_path, capsys):
    parts, folder = halfway
    for name in ("optimizer/99/exp_avg", "optimizer/x", "else/0/x", "optimizer"):
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        kept = shutil.copytree(folder, tmp_path / "made") / "step-00000002"
        tensors = load_file(kept / "tensors.safetensors")
        save_file({**tensors, name: torch.zeros(1)}, kept / "tensors.safetensors")
        digests = json.loads((kept / "digests.json").read_text())
        content = (kept / "tensors.safetensors").read_bytes()
        digests["tensors.safetensors"] = hashlib.sha256(content).hexdigest()
        (kept / "digests.json").write_text(json.dumps(digests))
        run = json.loads((kept / "state.json").read_text())["run"]
        part = {key: getattr(parts, key) for key in ("model", "layers", "optimizer")}
        assert checkpoint.load(kept.parent, run=run, **part) is None
        assert f"has {name}, which is nobody's" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_kept(tmp_path, value):
    model = torch.nn.Linear(2, 2)
    given = {"run": {}, "model": model, "layers": {}, "state": {},
             "optimizer": torch.optim.SGD(model.parameters())}  # fmt: skip
    for step in (1, 2):
        checkpoint.save(tmp_path, step, **given)
        model.bias.data[1] = value
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_cost_of_a_run_is_that_of_all_its_sessions(cut_off, monkeypatch):
    _, (_, newest), go_on = cut_off
    saved = json.loads((newest / "state.json").read_text())["meter"]
    taken, load = [], meter.Meter.load_state_dict
    monkeypatch.setattr(
        meter.Meter, "load_state_dict", lambda self, state: taken.append(state) or load(self, state)
    )
    go_on()
    assert taken == [saved] and saved["eval_s"] > 0


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
    for path in kept:  # as before a checkpoint said whose it is
        edit_state(path, format=2, run=None, sessions=None)
    overrides = [*made[2], f"run_dir={parts}"]
    assert cli.exactly(*overrides) == 1
    assert cli.err == (
        f"error: {kept[-1]} was written by another version of this project, which cannot go on "
        "from it; force=true starts the run anew.\n"
    )
    assert cli.exactly(*overrides, "force=true") == 0 and "continuing" not in cli.out
    assert comparable(made[0]) == comparable(parts)


# ---- whose it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["run_key", "fingerprints"])
def test_a_checkpoint_of_another_run_is_passed_over(cli, cut_off, other):
    """Even one that seems to be of a later step, of which this run never gets rid by counting."""
    parts, (_, newest), go_on = cut_off
    foreign = newest.with_name("step-00000007")
    shutil.copytree(newest, foreign)
    run = json.loads((newest / "state.json").read_text())["run"]
    changed = "0" * 64 if other == "run_key" else {**run["fingerprints"], "data": "0" * 64}
    edit_state(foreign, step=7, run={**run, other: changed})
    go_on()
    assert cli.err == f"Warning: {foreign} is of another run; it is not used.\n"
    assert f"continuing {parts} after step 6" in cli.out


def test_a_run_whose_folder_was_moved_goes_on(cli, cut_off, made):
    parts, _, _ = cut_off
    moved = cli.root / "elsewhere" / "renamed"
    moved.parent.mkdir()
    parts.rename(moved)
    assert cli.exactly(*made[2], f"run_dir={moved}") == 0, cli.err
    assert "after step 6" in cli.out and comparable(made[0]) == comparable(moved)
    same_adapter(made[0], moved)


# ---- by what it was computed ---------------------------------------------------------------------


def another_package(monkeypatch) -> str:
    real = metadata.version
    monkeypatch.setattr(
        hardware.metadata, "version", lambda name: "9.9" if name == "numpy" else real(name)
    )
    return f"numpy is 9.9, was {real('numpy')}"


def another_processor(monkeypatch) -> str:
    was = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NEON")
    return f"cpu_capability is NEON, was {was}"


def other_code(monkeypatch) -> str:
    files = {**inputs.code_of_runs(), "harness/loop/step.py": "0", "variants/new.py": "1"}
    monkeypatch.setattr(sessions, "code_of_runs", lambda: files)
    return "the code differs in harness/loop/step.py, variants/new.py"


CHANGES = [another_package, another_processor, other_code]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_run_is_not_continued_by_something_else_unless_it_is_told_so(
    cli, cut_off, made, monkeypatch, change
):
    parts, kept, _ = cut_off
    before = (parts / "environment.json").read_text()
    with monkeypatch.context() as patch:
        differs = change(patch)
        assert cli.exactly(*made[2], f"run_dir={parts}") == 1
        assert f"interrupted after step 6 in another environment ({differs}); go on" in cli.err
        assert cli.err.count("\n") == 1 and kept[-1].is_dir()
        assert (parts / "environment.json").read_text() == before
        anyway = (*made[2], f"run_dir={parts}", "train.resume=anyway")
        assert cli.exactly(*anyway) == 0, cli.err
        assert "after step 6" in cli.out
    result = cli.result(parts)
    first, second = result["sessions"]
    assert (first["after_step"], second["after_step"]) == (0, 6)
    assert second["differs"] == [differs] and "differs" not in first
    assert result["run_key"] == cli.result(made[0])["run_key"]  # it is no other run for that
    assert "sessions" not in cli.result(made[0])


def test_what_computes_nothing_may_change_between_sessions(cli, cut_off, made, monkeypatch):
    real = hardware.environment
    neutral = {"commit": "0" * 40, "uncommitted_changes": True, "cores": 3, "processes": 2}
    monkeypatch.setattr(hardware, "environment", lambda *a: {**real(*a), **neutral})
    parts, _, _ = cut_off
    assert cli.exactly(*made[2], f"run_dir={parts}") == 0, cli.err
    assert "after step 6" in cli.out and "sessions" not in cli.result(parts)
    same_adapter(made[0], parts)


def test_what_a_runs_code_is():
    """All that train.py imports, wherever it does, but not tests, documents and results, nor what
    only starts runs or reads them."""
    root, found, open_ = inputs.ROOT, set(), [inputs.ROOT / "train.py"]
    while open_:
        path = open_.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        guarded = {
            node
            for test in ast.walk(ast.parse(path.read_text()))
            if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
            for node in ast.walk(test)
        }
        skipped = {ast.unparse(node) for node in guarded}
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and ast.unparse(node) not in skipped:
                names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                place = root / name.replace(".", "/")
                open_ += [place.with_suffix(".py"), place / "__init__.py"]
    imported = {path.relative_to(root).as_posix() for path in found}
    imported |= {path.relative_to(root).as_posix() for path in (root / "variants").glob("*.py")}
    code = set(inputs.code_of_runs())
    assert {"harness/loop/step.py", "variants/layer.py", "train.py"} <= imported
    assert imported <= code, imported - code
    assert not any(
        name.startswith(("tests", "docs", "results", "harness/compare")) for name in code
    )


def test_an_edit_is_seen_where_it_counts(tmp_path, monkeypatch):
    for name in ("variants/a.py", "harness/loop/step.py", "harness/compare/page.py", "train.py",
                 "tests/test_a.py", "results/a.py", "harness/study/pool.py"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    monkeypatch.setattr(inputs, "ROOT", tmp_path)

    def changed_by(name: str) -> bool:
        before = inputs.code.__wrapped__(*ASKED)
        (tmp_path / name).write_text("2\n")
        return inputs.code.__wrapped__(*ASKED) != before

    ASKED = (("variants", "harness", "train.py"), ("harness/compare", "harness/study/pool.py"))
    assert all(map(changed_by, ("variants/a.py", "harness/loop/step.py", "train.py")))
    unrelated = (
        "harness/compare/page.py",
        "tests/test_a.py",
        "results/a.py",
        "harness/study/pool.py",
    )
    assert not any(map(changed_by, unrelated))


def test_a_page_says_that_a_run_is_of_two_environments(tmp_path):
    import numpy as np

    study = made_study()
    told = [
        {"after_step": 0, "environment": {}},
        {"after_step": 40, "environment": {}, "differs": ["torch is 2.14, was 2.13"]},
    ]
    at = next(i for i, run in enumerate(study.runs) if run.phase == "compare" and run.complete)
    mixed = dataclasses.replace(study.runs[at], result={**study.runs[at].result, "sessions": told})
    runs = [*study.runs[:at], mixed, *study.runs[at + 1 :]]
    warnings = analyse(dataclasses.replace(study, runs=runs), np.random.default_rng(0)).warnings
    (said,) = (w for w in warnings if "continued after step 40" in w)
    assert f"{mixed.arm} (seed {mixed.seed}, compare)" in said and "2.14, was 2.13" in said
    file = Path(tmp_path, "runs.jsonl")
    file.write_text(row(mixed) + "\n")
    assert read_rows(file) == [mixed]
    broken = {**mixed.result, "sessions": [{}, 3]}
    file.write_text(row(dataclasses.replace(mixed, result=broken)) + "\n")
    with pytest.raises(ValueError, match=r"lacks sessions\.0\.after_step"):
        read_rows(file)
