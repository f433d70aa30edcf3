"""Files that are read run nothing, reading ends, and a wrong one is one sentence.

The files are those that runs, exports and studies write, with one value at a time replaced.
"""

import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command import Captured, CommandLine
from made_study import made_study, write_run_folders
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from harness.adapter import imported, inference, native, peft_format, tensors
from harness.adapter.evaluate import main as evaluate
from harness.adapter.export import main as export
from harness.adapter.predict import main as predict
from harness.adapter.restore import restore
from harness.advise import __main__ as advise
from harness.compare import load, table
from harness.compare.analyse import analyse
from harness.compare.rows import row
from harness.compare.study import study_text
from harness.disk import patterns
from harness.disk import read as disk
from harness.disk.digest import digest
from harness.inspect.__main__ import main as inspect
from harness.loop import checkpoint
from harness.memory import __main__ as memory
from harness.models import hf, tiny
from harness.tasks import token_cache

# Every 1st place or kind under `slow`; in every test run, some.
some = pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])

# One of each kind of value that a file can hold.
KINDS = [None, True, 3, -1, 2.5, 10**19, 1e300, "x", "", "3", [], [1], ["x"], {}, {"a": 1}]


def places(node, at=()):
    """The path of every value in a nested one, itself left out."""
    children = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, child in children:
        yield (*at, key)
        yield from places(child, (*at, key))


def value_at(node, at):
    for key in at:
        node = node[key]
    return node


def with_value(node, at, value):
    """A copy with another value at one place."""
    changed = copy.deepcopy(node)
    value_at(changed, at[:-1])[at[-1]] = value
    return changed


def cases(node):
    """Every place with every kind of value."""
    return [(at, kind) for at in places(node) for kind in KINDS]


def texts_in(node):
    return [at for at in places(node) if isinstance(value_at(node, at), str)]


def is_one_sentence(error):
    return str(error).count("\n") == 0 and 0 < len(str(error)) < 2000


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the folder of a run that has finished, with its adapter in both formats and a checkpoint,
    the command line that made it)."""
    chosen = ("variant=lora", "targets=[query]", "train.keep_checkpoints=null")
    with pytest.MonkeyPatch.context() as patch:
        cli = CommandLine(tmp_path_factory.mktemp("run"), patch, Captured(patch))
        cli.defaults = [d for d in cli.defaults if not d.startswith("train.steps")]
        command = [*cli.defaults, *chosen, "train.steps=4"]
        assert cli.exactly(*command) == 0, cli.err
    return cli.folders()[0], command


@pytest.fixture
def copied(run, tmp_path):
    """A copy of its folder."""
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run"


def write_about(folder, content):
    """native.json, with the digest of its content."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps({**content, "sha256": digest(content)})
    (folder / "adapter" / native.ABOUT).write_text(text)


# ---- nothing runs --------------------------------------------------------------------------------


def payloads(canary):
    """Values by which Hydra and OmegaConf can be made to call, read and resolve."""
    call = {"_target_": "builtins.open", "file": str(canary), "mode": "w"}
    inline = f"{{_target_: builtins.open, file: '{canary}', mode: w}}"
    return {
        "oc.create": f"${{oc.create:{inline}}}",
        "oc.decode": "${oc.decode:\"{'_target_': builtins.open}\"}",
        "environment": "${oc.env:CANARY}",
        "every resolver": "${oc.env:CANARY}${oc.select:seed}${now:%Y}${hydra:runtime.cwd}"
        "${python_version:}${oc.dict.keys:train}${oc.dict.values:train}${oc.deprecated:seed}"
        "${seed}${.x}${x:${oc.env:CANARY}}",
        "unfinished": "${",
        "a name": "builtins.open",
        "a call": call,
        "a partial call": {**call, "_partial_": True},
        "arguments": {"_target_": "builtins.open", "_args_": [str(canary), "w"]},
        "not recursive": {**call, "_recursive_": False, "_convert_": "none"},
        "defaults": {"defaults": [{"/variant": "lora"}], "hydra": {"searchpath": ["pkg://x"]}},
    }


NAMES = list(payloads(Path("x")))


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that is there if something was called, and a secret that is said if resolved."""
    monkeypatch.setenv("CANARY", "tweet-" + "tweet" * 3)
    return tmp_path / "canary"


def check_quiet(canary, *said):
    assert not canary.exists()
    for text in said:
        assert "tweettweet" not in str(text)


def restored(folder):
    """Reads an adapter as predict, evaluate, export, inspect and init_from do."""
    found = restore(folder)
    inference.sample_texts(found, 2)
    inference.recorded_task(found.config)


@some
@pytest.mark.parametrize("name", NAMES)
def test_no_value_of_an_adapter_is_called_or_resolved(name, step, copied, canary):
    about = json.loads((copied / "adapter" / native.ABOUT).read_text())
    for at in texts_in(about)[NAMES.index(name) % step :: step]:
        write_about(copied, with_value(about, at, payloads(canary)[name]))
        try:
            restored(copied)
        except ValueError as error:
            assert is_one_sentence(error), (at, error)
            check_quiet(canary, error)
        check_quiet(canary)


PLACES = [
    ("variant", "store", "_target_"),
    ("variant", "store"),
    ("variant", "adapter", "alpha"),
    ("model",),
    ("task", "_target_"),
    ("task", "files", "train"),
    ("train", "device"),
]


@pytest.mark.parametrize("at", PLACES, ids=".".join)
def test_no_command_calls_or_resolves_a_value_of_an_adapter(at, copied, canary, capfd, monkeypatch):
    about = json.loads((copied / "adapter" / native.ABOUT).read_text())
    out = str(canary.parent / "out")
    cli = CommandLine(canary.parent, monkeypatch, Captured(monkeypatch))
    commands = [
        (predict, "--text", "a film"),
        (evaluate,),
        (export, "--merged", out),
        (export, "--peft", out, "--replace"),
        (inspect,),
    ]
    for name in ("environment", "a call"):
        write_about(copied, with_value(about, ("config", *at), payloads(canary)[name]))
        for command, *options in commands:
            with pytest.raises(SystemExit) as ended:
                command([str(copied), *options])
                raise SystemExit(0)  # some commands do not read this value
            check_quiet(canary, ended.value)
        assert cli(f"init_from={copied}", "targets=[query]", "train.steps=1") in (0, 1)
        assert "Traceback" not in cli.err
        check_quiet(canary, cli.out, cli.err)
    check_quiet(canary, *capfd.readouterr())


@pytest.mark.parametrize("name", NAMES)
def test_no_value_of_an_adapter_of_peft_is_called_or_resolved(name, copied, canary):
    folder = copied / "adapter"
    for file in (native.ABOUT, native.TENSORS):
        (folder / file).unlink()
    config = json.loads((folder / peft_format.CONFIG).read_text())
    for at in [*places(config), ("base_model_name_or_path",), ("rank_pattern", "a")]:
        (folder / peft_format.CONFIG).write_text(
            json.dumps(with_value(config, at, payloads(canary)[name]))
        )
        try:
            imported.restore(folder)
        except ValueError as error:
            assert is_one_sentence(error), (at, error)
            check_quiet(canary, error)
        check_quiet(canary)


@pytest.fixture(scope="module")
def archived(tmp_path_factory):
    """A study as results/ holds it: study.yaml and runs.jsonl."""
    made = made_study(arms=("lora", "dora"), seeds=2, tuning_seeds=1, items=12, diverged=False)
    folder = tmp_path_factory.mktemp("results") / "made"
    folder.mkdir()
    (folder / "study.yaml").write_text(study_text(made))
    (folder / "runs.jsonl").write_text("".join(row(run) + "\n" for run in made.runs))
    return folder


def concluded(folder):
    """Everything that a report's tables say of a folder; without its bootstrap, which is slow."""
    read = load.load_study(folder)
    runs = [dataclasses.replace(run, correct=None) for run in read.runs]
    analysis = analyse(dataclasses.replace(read, runs=runs), np.random.default_rng(0))
    return table.markdown(analysis) + table.csv_text(analysis)


@pytest.mark.parametrize("name", ["oc.create", "every resolver", "a call", "defaults"])
def test_no_value_of_a_study_is_called_or_resolved(name, archived, tmp_path, canary):
    kept = shutil.copytree(archived, tmp_path / "made")
    study = yaml.safe_load((archived / "study.yaml").read_text())
    first, *rest = (archived / "runs.jsonl").read_text().splitlines()
    for file, content, write in (
        ("study.yaml", study, lambda value: yaml.safe_dump(value, allow_unicode=True)),
        ("runs.jsonl", json.loads(first), lambda v: "\n".join([json.dumps(v), *rest]) + "\n"),
    ):
        text = (kept / file).read_text()
        for at in [p for p in texts_in(content) if "expected" not in p or p[1] == 0][::3]:
            (kept / file).write_text(write(with_value(content, at, payloads(canary)[name])))
            try:
                said = concluded(kept)
            except ValueError as error:
                said = error
                assert is_one_sentence(error), (file, at, error)
            check_quiet(canary, said)
        (kept / file).write_text(text)


RUN_PLACES = [("run.json", "run_id"), ("run.json", "config"), ("run.json", "fingerprints", "data"),
              ("result.json", "variant"), ("result.json", "reason"), ("result.json", "status"),
              ("result.json", "metrics", "accuracy"), ("environment.json", "commit"),
              ("checkpoints/step-00000002/state.json", "meter"),
              ("checkpoints/step-00000002/state.json", "rank_history")]  # fmt: skip


@pytest.mark.parametrize("at", RUN_PLACES, ids=lambda at: f"{Path(at[0]).stem}-{at[-1]}")
def test_no_value_of_a_runs_folder_is_called_or_resolved(at, run, canary, monkeypatch):
    """By the same command again, nor by a comparison."""
    folder, command = run
    folder = shutil.copytree(folder, canary.parent / "runs" / "copied")
    cli = CommandLine(canary.parent, monkeypatch, Captured(monkeypatch))
    file = folder / at[0]
    if "checkpoints" in at[0]:
        (folder / "result.json").unlink()
    content = json.loads(file.read_text())
    for name in ("environment", "a call"):
        file.write_text(json.dumps(with_value(content, at[1:], payloads(canary)[name])))
        if "checkpoints" in at[0]:  # whoever writes the file writes its digest
            digests = {
                name: hashlib.sha256((file.parent / name).read_bytes()).hexdigest()
                for name in (checkpoint.TENSORS, checkpoint.STATE)
            }
            (file.parent / checkpoint.DIGESTS).write_text(json.dumps(digests))
        assert cli.exactly(*command, f"run_dir={folder}") in (0, 1)
        assert "Traceback" not in cli.err, (at, name, cli.err)
        with contextlib.suppress(ValueError):
            concluded(folder.parent)
        check_quiet(canary, cli.out, cli.err)


@pytest.mark.parametrize("file", ["run.json", "result.json"])
def test_no_job_calls_or_resolves_a_value_of_a_runs_folder(file, canary, monkeypatch):
    cli = CommandLine(canary.parent, monkeypatch, Captured(monkeypatch))
    run = ("variant=lora", "targets=[query]", "train.steps=2")
    assert cli(*run) == 0, cli.err
    path = cli.folders()[0] / file
    at = ("config",) if file == "run.json" else ("variant",)
    content = with_value(json.loads(path.read_text()), at, payloads(canary)["a call"])
    path.write_text(json.dumps(content))
    assert cli("-m", "seed=0,1", *run) in (0, 1)
    check_quiet(canary, cli.out, cli.err)


@pytest.fixture
def model(tmp_path):
    """The folder of a base model."""
    tiny.load(labels=["a", "b"], seed=0).tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
             "intermediate_size": 8, "vocab_size": 400}  # fmt: skip
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def language_model(tmp_path):
    """The folder of another, with a generation config."""
    base, folder = tiny.load(labels=None, seed=0, architecture="llama"), tmp_path / "language"
    base.tokenizer.save_pretrained(folder)
    base.model.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.5}')
    return folder


def test_no_value_of_a_model_is_called_or_resolved(model, canary):
    """transformers reads it; nothing of ours hands it on to a config."""
    file = model / "config.json"
    config = json.loads(file.read_text())
    for at in [*texts_in(config), ("attn_implementation",), ("auto_map",), ("name_or_path",)]:
        for name in ("oc.create", "every resolver", "a call"):
            file.write_text(json.dumps(with_value(config, at, payloads(canary)[name])))
            try:
                found = hf.load(labels=["a", "b"], seed=0, name=str(model))
            except ValueError as error:
                assert is_one_sentence(error), (at, error)
                check_quiet(canary, error)
            else:
                check_quiet(canary, found.notes, found.name)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "generation_config.json", "tokenizer.json"]
)
def test_no_value_of_a_tokenizer_or_a_generation_config_is_called_or_resolved(
    name, language_model, canary
):
    """Nor one that transformers might look for there."""
    file = language_model / name
    content = json.loads(file.read_text())
    vocabulary = ("model", "vocab"), ("model", "merges")
    found = [at for at in places(content) if at[:2] not in vocabulary]
    more = [("auto_map",), ("tokenizer_class",), ("chat_template",), ("custom_generate",)]
    for at in [*found[:: max(1, len(found) // 12)], *more]:
        for payload in ("oc.create", "every resolver", "a call"):
            value = payloads(canary)[payload]
            file.write_text(json.dumps(with_value(content, at, value)))
            try:
                loaded = hf.load(labels=None, seed=0, name=str(language_model))
            except ValueError as error:
                assert is_one_sentence(error), (at, error)
                check_quiet(canary, error)
            else:
                check_quiet(canary, loaded.notes, loaded.tokenizer.special_tokens_map)


@pytest.mark.parametrize("name", ["oc.create", "every resolver", "a call", "deep"])
def test_no_value_of_the_cache_is_called_or_resolved(name, canary, monkeypatch):
    """Its files are this user's own; what else they may be is no error, but made again."""
    monkeypatch.setenv("LORA_VARIANTS_CACHE", str(canary.parent))
    value = {**payloads(canary), "deep": DEEP}[name]
    tokens = {"train": {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}}
    token_cache.save("key", tokens, {"cut": {"train": 0}})
    assert token_cache.load("key") == (tokens, {"cut": {"train": 0}})
    kept = load_file(token_cache.cache_file("key"))
    for counts in (json.dumps(value), json.dumps({"cut": value}), value):
        text = counts if isinstance(counts, str) else json.dumps(counts)
        arrays = {key: tensor.numpy() for key, tensor in kept.items()}
        about = {"counts": text, "sha256": token_cache._sha256("key", text, arrays)}
        save_file(kept, token_cache.cache_file("key"), metadata=about)
        assert token_cache.load("key") is None
    check_quiet(canary)


def test_no_command_calls_or_resolves_a_value_of_a_model(model, canary, capfd):
    """Also those that load no weights."""
    file = model / "config.json"
    config = json.loads(file.read_text())
    given = ["model=hf", f"model.name={model}"]
    for at, name in ((("hidden_act",), "oc.create"), (("_name_or_path",), "every resolver")):
        file.write_text(json.dumps(with_value(config, at, payloads(canary)[name])))
        for say in (memory.table, functools.partial(advise.advice, results=canary.parent)):
            try:
                check_quiet(canary, say(given))
            except ValueError as error:
                assert is_one_sentence(error), (at, error)
                check_quiet(canary, error)
    check_quiet(canary, *capfd.readouterr())


@pytest.mark.filterwarnings("ignore")  # torch's, of weights without an element
@pytest.mark.parametrize("step", [67, pytest.param(7, marks=pytest.mark.slow)])
def test_every_value_of_a_model_is_held_to_its_kind(step, model, language_model):
    """By transformers, or by what is made of it here; but for a number of layers that no computer
    has the time to build."""
    for folder, labels in ((model, ["a", "b"]), (language_model, None)):
        for file in sorted(folder.glob("*config.json")):
            content = json.loads(file.read_text())
            for at, kind in cases(content)[::step]:
                if kind == 10**19:
                    continue
                file.write_text(json.dumps(with_value(content, at, kind)))
                for read in (hf.outline, functools.partial(hf.load, seed=0)):
                    try:
                        read(labels=labels, name=str(folder))
                    except ValueError as error:
                        assert is_one_sentence(error) and str(folder) in str(error), (at, kind)
            file.write_text(json.dumps(content))


def test_kernels_of_the_hub_are_never_run(model):
    """transformers takes them by a name in config.json, owner/repository, if it may."""
    file = model / "config.json"
    config = json.loads(file.read_text())
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        file.write_text(json.dumps({**config, key: "somebody/kernel"}))
        with pytest.raises(ValueError, match="somebody/kernel"):
            hf.load(labels=["a", "b"], seed=0, name=str(model))


class Opens:
    """Writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def test_weights_that_would_run_code_are_refused_without_advice(model, canary):
    """A pickle is not even opened."""
    (model / "model.safetensors").unlink()
    torch.save({"weight": Opens(canary)}, model / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"a pickle, .* never read here; save it as model.safetensors"
    ) as error:
        hf.load(labels=["a", "b"], seed=0, name=str(model))
    assert "weights_only" not in str(error.value) and not canary.exists()


# ---- everything is of its kind -------------------------------------------------------------------


@some
def test_every_value_of_an_adapter_is_held_to_its_kind(step, copied):
    about = json.loads((copied / "adapter" / native.ABOUT).read_text())
    for at, kind in cases(about)[::step]:
        write_about(copied, with_value(about, at, kind))
        try:
            restored(copied)
        except ValueError as error:
            assert is_one_sentence(error), (at, kind, error)


def test_every_value_of_an_adapter_of_peft_is_held_to_its_kind(copied):
    folder = copied / "adapter"
    config = json.loads((folder / peft_format.CONFIG).read_text())
    config |= {"rank_pattern": {"nothing": 3}, "alpha_pattern": {"nothing": 3}}
    for at in places(config):
        for kind in KINDS:
            changed = with_value(config, at, kind)
            (folder / peft_format.CONFIG).write_text(json.dumps(changed))
            try:
                found = peft_format.read(folder)
            except ValueError as error:
                assert is_one_sentence(error) and str(folder) in str(error), (at, kind, error)
            else:
                assert all(0 < scale < 1e308 for scale in found.scales.values()), (at, kind)


@some
def test_every_value_of_an_archive_is_held_to_its_kind(step, archived, tmp_path):
    kept = shutil.copytree(archived, tmp_path / "made")
    first, *rest = (archived / "runs.jsonl").read_text().splitlines()
    row = json.loads(first)
    row["curve"] = row["curve"][:2]
    file = kept / "runs.jsonl"
    for at, kind in cases(row)[::step]:
        file.write_text("\n".join([json.dumps(with_value(row, at, kind)), *rest]) + "\n")
        try:
            concluded(kept)
        except ValueError as error:
            assert is_one_sentence(error), (at, kind, error)


@some
def test_every_value_of_a_study_is_held_to_its_kind(step, archived, tmp_path):
    kept = shutil.copytree(archived, tmp_path / "made")
    study = yaml.safe_load((archived / "study.yaml").read_text())
    study["expected"] = study["expected"] and study["expected"][:1]
    for at, kind in cases(study)[::step]:
        (kept / "study.yaml").write_text(yaml.safe_dump(with_value(study, at, kind)))
        try:
            concluded(kept)
        except ValueError as error:
            assert is_one_sentence(error), (at, kind, error)


@some
def test_every_value_of_a_runs_folder_is_held_to_its_kind(step, tmp_path):
    made = made_study(arms=("lora",), seeds=1, tuning_seeds=0, items=3, diverged=False)
    write_run_folders(made, tmp_path)
    (folder,) = tmp_path.iterdir()
    files = ("run.json", "environment.json", "result.json", "metrics.jsonl", "predictions.jsonl")
    for name in files:
        file = folder / name
        text = file.read_text()
        first, *rest = text.splitlines() if name.endswith("l") else [text]
        content = json.loads(first)
        for at, kind in [*cases(content)[::step], *(((), kind) for kind in KINDS)]:
            changed = with_value(content, at, kind) if at else kind
            file.write_text("\n".join([json.dumps(changed), *rest]) + "\n")
            try:
                concluded(tmp_path)
            except ValueError as error:
                assert is_one_sentence(error), (name, at, kind, error)
        file.write_text(text)


# ---- texts that no computer should swallow -------------------------------------------------------

DEEP = "[" * 200_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEEP, "nests more than 64 brackets"),
        ('{"a":' * 65 + "1" + "}" * 65, "nests more than 64 brackets"),
        ("1" + "0" * 400, "a whole number of 401 digits"),
        ("1" * 5000, "a whole number of 5000 digits"),
        ("1e999", "the number 1e999 is too large"),
        ("NaN", "NaN, which is no number"),
        ('"\\ud800"', "half of a surrogate pair"),
        ("{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
    ids=range(9),
)
def test_a_text_is_read_or_refused_in_one_sentence(text, said):
    with pytest.raises(ValueError, match=f"^file.*{said}") as error:
        disk.parse_json(text, "file")
    assert is_one_sentence(error.value)


def test_what_is_deep_but_human_is_read():
    text = '{"a":' * 64 + "1" + "}" * 64
    assert disk.parse_json(text, "file") == json.loads(text)
    assert disk.parse_json('"\\ud83d\\ude00 \\\\ud800"', "file") == "\U0001f600 \\ud800"


@pytest.mark.parametrize(
    "text",
    ["a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", DEEP, "a: " + "1" * 5000, "{", "!!python/x",
     "a: !!python/object/apply:os.system [ls]", "a: 2026-13-45", "a: !!bool x", "a: !!timestamp x",
     "a: !!int ''", "a: !!float ''"],
    ids=range(11),
)  # fmt: skip
def test_yaml_is_read_or_refused_in_one_sentence(text, tmp_path):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"study\.yaml") as error:
        disk.read_yaml(tmp_path / "study.yaml", dict)
    assert is_one_sentence(error.value)


def test_a_file_that_never_ends_is_not_read(copied):
    """A pipe that nobody writes to, or /dev/zero."""
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        for name in (native.ABOUT, native.TENSORS, peft_format.CONFIG, peft_format.TENSORS):
            path = copied / "adapter" / name
            kept = path.read_bytes()
            path.unlink()
            make(path)
            try:
                restored(copied)
                peft_format.read(copied / "adapter")
            except ValueError as error:
                assert is_one_sentence(error)
            path.unlink()
            path.write_bytes(kept)


@pytest.mark.parametrize(
    "pattern", ["(([a-z.]+)*)*!", "(a|aa)+$", "(.|..)+[0-9]x", "(\\w+\\.?)+!$"]
)
def test_a_pattern_that_never_ends_is_given_up(pattern, copied, monkeypatch):
    monkeypatch.setattr(patterns.Budget.__init__, "__defaults__", (0.5,))  # seconds
    folder = copied / "adapter"
    config = json.loads((folder / peft_format.CONFIG).read_text())
    for field in ("rank_pattern", "alpha_pattern"):
        changed = {**config, field: {pattern: 8, "a" * 40 + "|" + pattern: 8}}
        (folder / peft_format.CONFIG).write_text(json.dumps(changed))
        try:
            peft_format.read(folder)
        except ValueError as error:
            assert "takes too long to match" in str(error) and field in str(error)


def test_patterns_share_one_budget():
    slow = patterns.compiled("^(a|aa)+$", "x")
    budget = patterns.Budget("x", seconds=0.2)
    with pytest.raises(ValueError, match="takes too long"):
        budget.search(slow, "a" * 80 + "b")
    assert budget.seconds < 0
    with pytest.raises(ValueError, match="takes too long"):
        budget.search(slow, "a" * 80 + "b")


@pytest.mark.parametrize(
    "pattern", ["(a{60000}){60000}", "a" * 501, "a{1,99999999999}", "(", "[b-a]"]
)
def test_a_pattern_that_needs_a_computer_of_its_own_is_refused(pattern):
    with pytest.raises(ValueError, match=r"^x is "):
        patterns.compiled(pattern, "x")


def test_tensors_of_every_dtype_are_read_or_refused(tmp_path):
    """The header of a safetensors file names any dtype, F4 among them, and any shape."""
    dtypes = ["F4", "F6_E2M3", "F8_E8M0", "C64", "U64", "BOOL", "X", ""]
    shapes = [[2], [2, 2**62], [-1], "x", []]
    for dtype in dtypes:
        for shape in shapes:
            header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 1]}}
            text = json.dumps(header).encode()
            file = tmp_path / "adapter_model.safetensors"
            file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
            try:
                tensors.read_tensors(file)
            except ValueError as error:
                assert is_one_sentence(error) and str(file) in str(error), (dtype, shape)


# ---- what a report says --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [("accuracy", 1.5, "from 0 to 1"), ("accuracy", -0.1, "from 0 to 1"),
     ("macro_f1", 2, "from 0 to 1"), ("loss_nats", -3, "from 0 to inf")],
)  # fmt: skip
def test_a_score_that_no_metric_has_is_refused(metric, value, said, archived, tmp_path):
    kept = shutil.copytree(archived, tmp_path / "made")
    first, *rest = (archived / "runs.jsonl").read_text().splitlines()
    row = json.loads(first)
    row["result"]["validation"][metric] = value
    (kept / "runs.jsonl").write_text("\n".join([json.dumps(row), *rest]))
    with pytest.raises(ValueError, match=rf"line 1: validation\.{metric} is {value}; .* {said}"):
        load.load_study(kept)


def test_correct_is_as_long_as_the_test(archived, tmp_path):
    kept = shutil.copytree(archived, tmp_path / "made")
    lines = (archived / "runs.jsonl").read_text().splitlines()
    number = next(n for n, line in enumerate(lines) if json.loads(line)["correct"])
    row = json.loads(lines[number])
    row["correct"] += "1"
    lines[number] = json.dumps(row)
    (kept / "runs.jsonl").write_text("\n".join(lines))
    said = rf"line {number + 1}: correct has 13 rows of test, and the result counts 12"
    with pytest.raises(ValueError, match=said):
        load.load_study(kept)


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1"])
def test_a_spreadsheet_finds_no_formula_in_a_table(name, archived, tmp_path):
    kept = shutil.copytree(archived, tmp_path / "made")
    renamed = (archived / "study.yaml").read_text().replace("dora", "arm to rename")
    study = yaml.safe_load(renamed)
    study = json.loads(json.dumps(study).replace("arm to rename", json.dumps(name)[1:-1]))
    study["arms"] = {
        arm: ["variant=dora"] if "lora" not in arm else value
        for arm, value in study["arms"].items()
    }
    (kept / "study.yaml").write_text(yaml.safe_dump(study))
    rows = [json.loads(line) for line in (archived / "runs.jsonl").read_text().splitlines()]
    rows = [{**row, "arm": name if row["arm"] == "dora" else row["arm"]} for row in rows]
    (kept / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    analysis = analyse(load.load_study(kept), np.random.default_rng(0))
    rows = csv.reader(io.StringIO(table.csv_text(analysis), newline=""))
    cells = [cell for row in rows for cell in row]
    assert f"'{name}" in cells
    for cell in cells:
        assert not cell.startswith(("=", "+", "@", "\t", "\r")), cell
        assert not cell.startswith("-") or float(cell) < 0, cell
