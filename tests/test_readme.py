"""The README's own code runs as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import CommandLine

from harness.models import tiny

TESTED = r"<!-- tested by tests/test_readme.py -->\n"
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_loop_in_the_readme_runs_and_learns():
    code = re.findall(TESTED + r"```python\n(.*?)```", README, re.DOTALL)[0]
    names: dict = {}
    exec("import torch; torch.manual_seed(0)\n" + code, names)
    assert names["loss"] < 1.3  # ln 4 = 1.386 at the start


def test_the_tree_lists_every_file_of_the_subject():
    root = Path(__file__).parent.parent
    for file in (root / "variants").glob("*.py"):
        assert file.name == "__init__.py" or file.name in README, file.name


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own
def test_the_commands_that_take_an_adapter_elsewhere_run(cli):
    """Word for word, on a run of the tiny model; commands that train get its settings."""
    peft = pytest.importorskip("peft")
    root = Path(__file__).parent.parent
    (block,) = re.findall(TESTED + r"```\n(RUN=.*?)```", README, re.DOTALL)
    assert cli("variant=dora", "rank=8") == 0, cli.err
    (cli.root / "reviews.txt").write_text("good\nbad\n")
    made = cli.folders()[-1]
    base = tiny.load(labels=("bad", "good"), seed=0).model
    targets = ["query", "value"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="SEQ_CLS")
    peft.get_peft_model(base, config).save_pretrained(cli.root / "theirs")
    (cli.root / "train.py").symlink_to(root / "train.py")
    setup, *commands = block.strip().splitlines()
    assert setup.startswith("RUN=outputs/") and len(commands) == 9
    environment = {**os.environ, "PYTHONPATH": str(root), "RUN": str(made)}
    for command in commands:
        command = command.partition("  #")[0].strip()
        if "train.py" in command:
            command += " " + " ".join(cli.defaults)
        done = subprocess.run(
            command.replace("python ", f"{sys.executable} ", 1),
            shell=True, cwd=cli.root, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert len((cli.root / "answers.jsonl").read_text().splitlines()) == 2
    assert (cli.root / "merged/model.safetensors").is_file()
    assert (cli.root / "plain/adapter_model.safetensors").is_file()
    assert (made / "inspect/page.html").is_file()
