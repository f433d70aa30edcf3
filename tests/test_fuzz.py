"""Whatever a user types or a file holds: a right result or one sentence, never a traceback.

The cases are drawn by hypothesis, the same at every run; `pytest -m slow` runs them.
"""

import csv
import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from adapters import checkpoint_state, config_of, write_adapter
from command import Captured, CommandLine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.adapter import native, peft_format
from harness.adapter.restore import restore
from harness.config import build
from harness.config.overrides import dotted_keys
from harness.loop import checkpoint
from harness.tasks import local, local_language

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


CASES = 400  # of each kind
DRAWN: list[int] = []


def cases(count: int):
    DRAWN.append(count)
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def is_one_sentence(error: Exception | str) -> bool:
    text = str(error)
    return bool(text.strip()) and "\n" not in text.strip() and "Traceback" not in text


# ---- the command line ----------------------------------------------------------------------------

NOT_TRIED = {  # they say where things are written, or load what is large or is not there
    "outputs_dir", "run_dir", "experiment", "model", "task", "force", "model.name", "dry_run",
    "train.compile", "train.threads", "train.device", "tracking", "variant", "optimizer",
    "schedule", "strategy", "_self_",
}  # fmt: skip
KEYS = sorted(
    key
    for key in {*dotted_keys(config_of("variant=adalora")), *dotted_keys(config_of())}
    if key not in NOT_TRIED
)
WORDS = st.sampled_from(
    ["true", "null", "''", "[]", "{}", "[1,2]", "{a: 1}", "[null]", "nan", "inf", "-inf", "1e400",
     "all", "last:1", "query", "[query,value]", "../../x", "'${seed}'", "${seed}", "${nothing}",
     "'a b'", "[a", "{", "0x10", "1_000", "float16", "bfloat16", "adapted", "{query: 2}", "é"]
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-3, 300), st.sampled_from([10**6, -(10**9), 2**63, 10**30]), st.floats()
)
VALUES = st.one_of(WORDS, NUMBERS.map(str), st.text(max_size=12))


@cases(CASES // 2)  # each builds a model
@given(
    variant=st.sampled_from(["lora", "dora", "adalora", "adalora_budget", "qlora", "full"]),
    overrides=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3),
)
def test_overrides(variant, overrides):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as root:
        run = CommandLine(Path(root), patch, Captured(patch))
        before = sorted(Path(root).rglob("*"))
        typed = [f"{key}={value}" for key, value in overrides.items()]
        code = run(f"variant={variant}", *typed, "dry_run=true")
        assert code in (0, 1), overrides
        assert "Traceback" not in run.err, (overrides, run.err)
        if code == 1:
            assert run.err.strip(), overrides
            assert len(run.err.strip().splitlines()) <= 8, (overrides, run.err)
        assert sorted(Path(root).rglob("*")) == before, "a dry run keeps nothing"


# ---- files of rows -------------------------------------------------------------------------------

TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["", " ", "\x00", "a,b", '"', "\ufeff"]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
FIELDS = st.sampled_from(["text", "label", "prompt", "completion", "messages", "role", "content"])
RECORDS = st.one_of(
    st.dictionaries(FIELDS, st.one_of(TEXTS, JSON), max_size=4),
    st.fixed_dictionaries({"text": TEXTS, "label": st.one_of(TEXTS, st.integers())}),
    st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}),
    st.fixed_dictionaries(
        {"messages": st.lists(st.fixed_dictionaries({"role": st.sampled_from(
            ["user", "assistant", "system", "tool", "User", ""]), "content": TEXTS}), max_size=4)}
    ),
    JSON,
)  # fmt: skip
LINES = st.one_of(RECORDS.map(json.dumps), st.text(max_size=30))


@st.composite
def contents(draw) -> bytes:
    """A file: rows of JSON or CSV in some encoding, with some damage; or anything."""
    kind = draw(st.sampled_from(["json", "csv", "any"]))
    if kind == "any":
        return draw(st.binary(max_size=200))
    if kind == "json":
        text = draw(st.sampled_from(["\n", "\r\n", "\n\n"])).join(draw(st.lists(LINES, max_size=6)))
    else:
        columns = draw(st.sampled_from(["text,label", "prompt,completion", "text", "label,text,"]))
        rows = draw(st.lists(st.lists(TEXTS, max_size=4), max_size=6))
        text = "\n".join([columns, *(",".join(row) for row in rows)])
    text *= draw(st.sampled_from([1, 1, 1, 50]))
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    content = text.encode(encoding, errors="ignore" if encoding == "latin-1" else "surrogatepass")
    if draw(st.booleans()) and content:
        at = draw(st.integers(0, len(content) - 1))
        content = content[:at] + draw(st.binary(max_size=3)) + content[at + 1 :]
    return content


READERS = {
    "classification": lambda path: local.read_rows(path),
    "sft": lambda path: local_language.read_sft_rows(path),
    "text": lambda path: local_language.read_text_rows(path),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@cases(CASES)
@given(content=contents(), suffix=st.sampled_from([".jsonl", ".csv", ".txt", ".json", ""]))
def test_rows(reader, content, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"rows{suffix}")
        path.write_bytes(content)
        try:
            rows = reader(path)
        except ValueError as error:
            assert is_one_sentence(error) and path.name in str(error), (content, error)
        else:
            assert rows, content


def test_a_huge_line_is_a_row_like_any_other(tmp_path):
    text = "word " * 2_000_000
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text, "label": "a"}) + "\n")
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], [text, "a"]])
    for name in ("rows.jsonl", "rows.csv"):
        (row,) = local.read_rows(tmp_path / name)
        assert row.label == "a" and len(row.text) >= len(text) - 1


# ---- folders of adapters and checkpoints ---------------------------------------------------------


@st.composite
def damages(draw, names: list[str]):
    """A function that damages one file of a folder."""
    name = draw(st.sampled_from(names))
    kind = draw(st.sampled_from(["replace", "insert", "cut", "empty", "remove", "swap", "double"]))
    where, some = draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=9))
    early = draw(st.booleans())  # the header, where most of the meaning is

    def damage(folder: Path) -> None:
        path = folder / name
        content = path.read_bytes()
        at = int(where * (min(len(content), 400) if early else len(content)))
        match kind:
            case "replace":
                path.write_bytes(content[:at] + some + content[at + len(some) :])
            case "insert":
                path.write_bytes(content[:at] + some + content[at:])
            case "cut":
                path.write_bytes(content[:at])
            case "empty":
                path.write_bytes(b"")
            case "remove":
                path.unlink()
            case "swap":
                path.write_bytes((folder / names[names.index(name) - 1]).read_bytes())
            case "double":
                path.write_bytes(content * 2)

    return damage


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A native adapter's folder, with PEFT's files beside."""
    run = write_adapter(tmp_path_factory.mktemp("run"), "variant=adalora", "targets=[query]")
    found = restore(run)
    config = config_of("variant=adalora", "targets=[query]")
    peft_format.write(
        run / "adapter",
        model=found.base.model,
        layers=found.layers,
        base="tiny",
        config=config,
        head=found.base.head,
    )
    return run / "adapter"


NATIVE, PEFT = [native.ABOUT, native.TENSORS], ["adapter_config.json", "adapter_model.safetensors"]


@cases(CASES)
@given(damage=damages(NATIVE))
def test_native_adapters(adapter, damage):
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "adapter")
        shutil.copytree(adapter, folder)
        damage(folder)
        try:
            restore(folder)
        except ValueError as error:
            assert is_one_sentence(error), error


@cases(CASES)
@given(damage=damages(PEFT))
def test_adapters_of_peft(adapter, damage):
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "adapter")
        folder.mkdir()
        for name in PEFT:
            shutil.copy(adapter / name, folder)
        damage(folder)
        try:
            found = peft_format.read(folder)
        except ValueError as error:
            assert is_one_sentence(error), error
        else:
            for factors in found.factors.values():
                assert all(bool(tensor.isfinite().all()) for tensor in factors.values())


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(a model with its layers and optimiser, a folder with two checkpoints of it)."""
    config = config_of("variant=adalora", "targets=[query]")
    task = build.make(config, "task")
    base = build.load_base(config, task.labels)
    layers = build.adapt(base, build.make_variant(config), config)
    optimizer = torch.optim.AdamW([p for p in base.model.parameters() if p.requires_grad])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    parts = {"model": base.model, "layers": layers, "optimizer": optimizer, "run": {"run_key": "1"}}
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        optimizer.step()
        checkpoint.save(folder, step, **parts, state=checkpoint_state())
    return SimpleNamespace(parts=parts, folder=folder)


@cases(CASES)
@given(damage=damages([checkpoint.TENSORS, checkpoint.STATE, checkpoint.DIGESTS]))
def test_checkpoints(begun, damage):
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "checkpoints")
        shutil.copytree(begun.folder, folder)
        newest = folder / "step-00000002"
        good = {path.name: path.read_bytes() for path in newest.iterdir()}
        damage(newest)
        left = {path.name: path.read_bytes() for path in newest.iterdir()}
        state = checkpoint.load(folder, **begun.parts)
        assert state is not None
        if left.keys() == good.keys() and all(
            left[name] == good[name] for name in (checkpoint.TENSORS, checkpoint.STATE)
        ):
            assert state["step"] in (1, 2)  # the digests alone were touched
        else:
            assert state["step"] == 1


def test_enough_cases(capsys):
    count = sum(DRAWN) + (len(READERS) - 1) * CASES
    assert count >= 2000
    with capsys.disabled():
        print(f"\n{count:,} cases drawn")
