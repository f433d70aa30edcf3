"""A stranger's variants, the files of docs/add_a_variant.md: no existing file is edited."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import contract
import pytest
from command import write_task

import variants

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/add_a_variant.md").read_text(encoding="utf-8")
BLOCK = r"<!-- tested by tests/test_add_a_variant.py: (\S+) -->\n```\w+\n(.*?)```"
FILES = dict(re.findall(BLOCK, PAGE, re.DOTALL))
FILES["conf/variant/pissa_offset.yaml"] = """defaults:
  - pissa
  - _self_
name: pissa_offset
adapter:
  init_base: offset
"""
NAMES = ["hra", "loha", "lora_fa", "pissa", "pissa_offset"]
LOW_RANK = ["lora_fa", "pissa", "pissa_offset"]


def write_files(folder):
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not (ROOT / name).exists(), f"{name} is in the repository already"
        path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def strangers(tmp_path_factory):
    """The files beside the repository's: a package has more than one folder, conf/ is copied."""
    folder = tmp_path_factory.mktemp("strangers")
    shutil.copytree(ROOT / "conf", folder / "conf")
    write_files(folder)
    variants.__path__.append(str(folder / "variants"))
    importlib.invalidate_caches()
    yield folder
    variants.__path__.remove(str(folder / "variants"))
    for name in FILES:
        if name.endswith(".py"):
            module = Path(name).stem
            sys.modules.pop(f"variants.{module}", None)
            vars(variants).pop(module, None)


class Strangers:
    @pytest.fixture(autouse=True)
    def in_their_folder(self, strangers):
        self.conf = strangers / "conf"


@pytest.mark.parametrize("name", NAMES)
class TestEveryStranger(Strangers, contract.Adapters):
    pass


@pytest.mark.parametrize("name", LOW_RANK)
class TestLowRankStrangers(Strangers, contract.LowRank):
    pass


@pytest.mark.parametrize("name", ["loha", "lora_fa"])
class TestStarts(Strangers, contract.Starts):
    pass


@pytest.mark.parametrize("name", ["hra", "pissa", "pissa_offset"])
class TestStartsByRounding(Strangers, contract.Starts):
    tolerance = 1e-5


def test_the_page_shows_all_of_them():
    assert {Path(name).stem for name in FILES if name.endswith(".yaml")} == set(NAMES)


# ---- the whole way, in a checkout of their own ---------------------------------------------------

DRIVE = """
import os, sys
import train, variants

def command(*arguments):
    sys.argv = ["train.py", *arguments]
    train.command()

def interrupted(layers, step, *rest, begin=variants.begin_step):
    if step == 7:
        raise KeyboardInterrupt
    begin(layers, step, *rest)

overrides = sys.argv[1:]
for name in NAMES:
    run = [*overrides, f"variant={name}", "variant.lr=0.01"]
    command(*run, f"run_dir=whole/{name}")
    begin, variants.begin_step = variants.begin_step, interrupted
    try:
        command(*run, f"run_dir=parts/{name}")
    except KeyboardInterrupt:
        pass
    assert not os.path.exists(f"parts/{name}/result.json")
    variants.begin_step = begin
    command(*run, f"run_dir=parts/{name}")

import json, runpy

def exit_code(*arguments):
    sys.argv = [*arguments]
    try:
        runpy.run_module(arguments[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0

codes, export = {}, "harness.adapter.export"
for name in NAMES:
    codes[name] = {
        "merged": exit_code(export, f"whole/{name}", "--merged", f"merged/{name}"),
        "peft": exit_code(export, f"whole/{name}", "--peft", f"peft/{name}"),
        "inspect": exit_code("harness.inspect", f"whole/{name}", "--dense", "--out", f"of/{name}"),
        "memory": exit_code("harness.memory", *overrides, f"variant={name}"),
    }
with open("codes.json", "w") as file:
    json.dump(codes, file)
"""


def python(folder, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """All that train.py needs, the strangers' files among it, and their runs."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("conf", "harness", "hydra_plugins", "variants"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder)
    write_files(folder)
    (folder / "drive.py").write_text(f"NAMES = {NAMES}\n{DRIVE}")
    for name in ("data", "merged", "peft"):
        (folder / name).mkdir()
    overrides = ["model=tiny", "tracking=none", "train.steps=8", "train.batch_size=4", "rank=4",
                 "train.eval_every=4", "train.log_every=2", "train.checkpoint_every=2",
                 "train.threads=1", "train.device=cpu", *write_task(folder / "data")]  # fmt: skip
    python(folder, "drive.py", *overrides)
    return folder


def result_of(folder):
    result = json.loads((folder / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in ("time", "memory")}


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_run_learns_and_goes_on_to_the_bit(checkout, name):
    whole, parts = checkout / "whole" / name, checkout / "parts" / name
    result = result_of(whole)
    assert result == {**result_of(parts), **{k: result[k] for k in ("resumed",) if k in result}}
    assert result["variant"] == name and result["status"] == "complete"
    assert result["merged_max_abs_diff"] < 1e-5
    tensors = [(folder / "adapter/native.safetensors").read_bytes() for folder in (whole, parts)]
    assert tensors[0] == tensors[1]
    losses = [
        row["train/loss_nats"]
        for row in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
        if "train/loss_nats" in row
    ]
    assert losses[-1] != losses[0]
    low_rank = (whole / "adapter/adapter_model.safetensors").is_file()
    assert low_rank == (name in LOW_RANK)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_merged_exported_and_inspected(checkout, name):
    codes = json.loads((checkout / "codes.json").read_text())[name]
    sentence = codes.pop("peft")
    assert codes == {"merged": 0, "inspect": 0, "memory": 0}
    assert (checkout / "merged" / name / "model.safetensors").is_file()
    if name in LOW_RANK:
        assert sentence == 0 and (checkout / "peft" / name / "adapter_model.safetensors").is_file()
    else:
        assert "is not W + s B A with a gain for each row" in sentence
    report = json.loads((checkout / f"merged/{name}.merge_report.json").read_text())
    assert all(row["cos"] > 0.999 for row in report["layers"])
