"""Secrets stay out of files, names in the output folder, texts out of a page's markup."""

import ast
import shutil
from pathlib import Path

import pytest
from command import CommandLine

from harness.compare.__main__ import main as compare
from harness.config.overrides import check_command_line
from harness.config.secrets import refuse_secrets
from harness.inspect.__main__ import main as inspect

ROOT = Path(__file__).parent.parent
PLANTED = {
    "WANDB_API_KEY": "canary-0123456789abcdef-wandb",
    "HF_TOKEN": "hf_canary0123456789",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+0123456789",
    "MY_DB_PASSWORD": "canary-password",
}


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    return CommandLine(tmp_path, monkeypatch, capsys)


def files(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ---- secrets -------------------------------------------------------------------------------------


def test_no_file_holds_a_secret_of_the_environment(cli):
    assert cli("-m", "variant=lora,dora", "train.evaluate_test=true") == 0, cli.err
    outputs = cli.root / "outputs"
    compare([str(outputs / "default"), "--out", str(cli.root / "report")])
    inspect([str(cli.folders()[0])])
    written = files(cli.root)
    for name in ("config.yaml", "environment.json", "run.json", "page.html", "inspect.json"):
        assert any(path.name == name for path in written), name
    for path, content in written.items():
        for name, secret in PLANTED.items():
            assert secret.encode() not in content, (path, name)
        assert ".hydra" not in path.parts


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+tracking.api_key=canary-typed", "tracking.api_key would be written to files"),
        ("++tracking.notes=canary-password", "environment variable MY_DB_PASSWORD"),
        ("task.name=x canary-0123456789abcdef-wandb y", "environment variable WANDB_API_KEY"),
        ("seed=${oc.env:HF_TOKEN}", "seed holds the value of the environment variable HF_TOKEN"),
        ("variant.name=${oc.env:HF_TOKEN}", "variant.name holds the value of the environment"),
        (
            "targets=[query,'${oc.env:MY_DB_PASSWORD}']",
            "targets holds the value of the environment",
        ),
        ("rank_pattern={canary-password: 4}", "environment variable MY_DB_PASSWORD"),
    ],
)
def test_a_secret_among_the_settings_is_refused_before_it_is_written(cli, override, said):
    assert cli("variant=lora", override) == 1, cli.out
    assert cli.err.startswith("error: ") and cli.err.count("\n") == 1 and said in cli.err
    assert not (cli.root / "outputs").exists()


def test_a_multirun_writes_no_secret_either(cli):
    """Not into the logs of its jobs, which begin with their command line."""
    assert cli("-m", "variant=lora,dora", "+tracking.api_key=canary-typed") == 1
    assert not (cli.root / "outputs").exists()


def test_what_is_no_secret_is_none(monkeypatch):
    for name, value in {"TOKENIZERS_PARALLELISM": "false-123", "MONKEY": "query-query"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHORT_KEY", "query")
    refuse_secrets("", {"task": {"max_tokens": 40}, "targets": ["query-query", "query"], "x": None})


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    ["experiment=../../x", "experiment=/etc/x", "variant.name=../../x", "variant.name=/x",
     "variant.name=.", "variant.name=a/b", "'variant.name=a\\\\b'", "seed=../../x",
     "+experiment=../x", "variant=../../x", "task=../../x"],
)  # fmt: skip
def test_names_do_not_leave_the_output_folder(cli, override):
    before = files(cli.root)
    assert cli("variant=lora", override) == 1, cli.out
    assert cli.err.strip() and "Traceback" not in cli.err
    assert files(cli.root) == before and not (cli.root / "outputs").exists()


# ---- pages ---------------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=alert(1)> & $x$ '\""


def test_the_name_of_an_inspected_run_is_text(cli):
    assert cli("variant=lora") == 0, cli.err
    hostile = cli.root / HOSTILE
    shutil.copytree(cli.folders()[0], hostile)
    inspect([str(hostile), "--out", str(cli.root / "out")])
    text = (cli.root / "out/page.html").read_text()
    assert "&lt;img src=x onerror=alert(1)&gt;" in text and "<img" not in text


# ---- code ----------------------------------------------------------------------------------------


def test_code_that_a_model_brings_is_never_run():
    """Nothing is unpickled: tests/test_house.py. Here, no call lets a download bring its code."""
    python = [ROOT / "train.py", *ROOT.glob("harness/**/*.py"), *ROOT.glob("variants/**/*.py")]
    for path in python:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
    for path in ROOT.glob("conf/**/*.yaml"):
        assert "trust_remote_code" not in path.read_text()
    with pytest.raises(ValueError, match="there is no key"):
        check_command_line(["model=hf", "model.trust_remote_code=true"], ROOT / "conf")
