"""The code of README.md and docs/ runs as printed."""

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import CommandLine
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from harness.compare import brief, multirun
from harness.compare.analyse import analyse
from harness.compare.load import load_study
from harness.models import tiny

TESTED = r"<!-- tested by tests/test_readme.py -->\n"
ROOT = Path(__file__).parent.parent


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


README = page("README.md")


def test_the_loop_of_the_page_runs_and_learns():
    code = re.findall(TESTED + r"```python\n(.*?)```", page("docs/variants.md"), re.DOTALL)[0]
    names: dict = {}
    exec("import torch; torch.manual_seed(0)\n" + code, names)
    assert names["loss"] < 1.3  # ln 4 = 1.386 at the start


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


PRINTED = (
    r"<!-- tested by tests/test_readme.py(?:: (results/\S+))? -->\n"
    r"```\n\$ (python train.py -m .*?)```"
)
ABLATIONS = re.findall(PRINTED, page("docs/many_runs.md"), re.DOTALL)


@pytest.mark.parametrize(("place", "text"), ABLATIONS, ids=[place for place, _ in ABLATIONS])
def test_an_ablation_prints_what_its_runs_say(place, text):
    """The table that is shown, from the archived runs; the command is that which made them."""
    folder = ROOT / place
    study = load_study(folder)
    printed = brief.text(analyse(study, np.random.default_rng(0))).splitlines()
    command, dots, *shown = text.strip().splitlines()
    assert dots == "..." and command == study.command
    assert [line for line in printed if line in shown] == shown and len(shown) > 5
    if "rank=1," in command:  # README has it too
        assert f"\n{command} " in README


def test_there_are_three_ablations():
    assert len(ABLATIONS) == 3


@pytest.mark.parametrize("text", [text for _, text in ABLATIONS])
def test_an_ablation_is_recorded_as_shown(cli, text):
    """Every command, on the tiny model: the record, and the head of the table."""
    command, _, varied, *_ = text.strip().splitlines()
    keys = re.findall(r"(?:varied: |and )(\w+) \(", varied)
    quick = [o for o in shlex.split(command)[2:] if not o.startswith(("train.", "seed="))]
    assert cli(*quick, "seed=0", "train.steps=1", "train.eval_every=1") == 0, cli.err
    assert varied in cli.out
    (record,) = multirun.read_all(cli.root / "outputs/default")
    assert record.keys == keys


# ---- every page ----------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "results/LOG.md"))]
WRITTEN += [ROOT / "tests/README.md", *sorted(ROOT.glob("results/*/README.md"))]
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def anchors(path):
    """Those that a code host gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_link_leads_somewhere(path):
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_readme_is_two_pages():
    """About 900 words and its commands; all else is a page of docs/, and README leads there."""
    assert len(FENCED.sub("", README).split()) < 1000
    for path in PAGES[1:]:
        assert f"](docs/{path.name})" in README, path.name


def commands(pattern):
    """Each command in a fence of README.md and docs/ that `pattern` begins, once, as words."""
    found = []
    for path in PAGES:
        for fence in FENCED.findall(path.read_text(encoding="utf-8")):
            for line in fence.replace("\\\n", " ").splitlines():
                if match := re.search(rf"(?:^|&& |^\$ ){pattern} (.*)", line):
                    found.append(tuple(shlex.split(match[1], comments=True)))
    return list(dict.fromkeys(found))


def overrides(words):
    """Those of Hydra among the words; of a sweep, the first value. A glob stays out."""
    parser = OverridesParser.create()
    for word in words:
        if "=" in word and "glob(" not in word and not word.startswith("-"):
            override = parser.parse_override(word)
            first = override.is_sweep_override() and next(override.sweep_string_iterator())
            yield f"{override.key_or_group}={first}" if first else word


TRAINING = commands(r"(?:python|torchrun .*) train\.py")
MODULES = commands("python -m")


def test_the_commands_of_the_pages_are_found():
    assert len(TRAINING) > 20 and len(MODULES) > 20


@pytest.mark.parametrize(
    "words", [words for words in [*TRAINING, *MODULES] if any(overrides(words))], ids=" ".join
)
def test_every_key_of_a_command_is_one_of_conf(words):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        compose("config", list(overrides(words)), return_hydra_config=True)


@pytest.mark.parametrize("words", MODULES, ids=" ".join)
def test_every_option_of_a_command_is_one_of_its_module(words, capsys):
    module, *arguments = words
    home = _home_of(
        {"harness.machine.hardware": "harness.loop.repeat"}.get(module, module)
    )  # it runs that
    if inspect.signature(home.main).parameters:
        with pytest.raises(SystemExit) as ended:
            home.main(["--help"])
        assert not ended.value.code
        known = capsys.readouterr().out
    else:  # its arguments are overrides of train.py
        known = inspect.getsource(home)
    for option in arguments:
        assert not option.startswith("--") or re.search(rf"{option}\b", known), option


def test_the_tree_lists_every_file_of_the_subject():
    tree = page("docs/add_a_variant.md")
    for file in (ROOT / "variants").glob("*.py"):
        assert file.name == "__init__.py" or file.name in tree, file.name


def _home_of(name):
    """The module that `python -m <name>` runs."""
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own
@pytest.mark.long
def test_the_commands_that_take_an_adapter_elsewhere_run(cli, monkeypatch):
    """Word for word, on a run of the tiny model; commands that train get its settings."""
    peft = pytest.importorskip("peft")
    (block,) = re.findall(TESTED + r"```\n(RUN=.*?)```", page("docs/adapters.md"), re.DOTALL)
    assert cli("variant=dora", "rank=8") == 0, cli.err
    (cli.root / "reviews.txt").write_text("good\nbad\n")
    made = cli.folders()[-1]
    base = tiny.load(labels=("bad", "good"), seed=0).model
    targets = ["query", "value"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="SEQ_CLS")
    peft.get_peft_model(base, config).save_pretrained(cli.root / "theirs")
    setup, *commands = block.strip().splitlines()
    assert setup.startswith("RUN=outputs/") and len(commands) == 9
    monkeypatch.chdir(cli.root)
    for command in commands:
        command = command.partition("  #")[0].replace("$RUN", str(made))
        python, script, *arguments = shlex.split(command)
        assert python == "python"
        if script == "train.py":
            assert cli(*arguments) == 0, (command, cli.err)
        elif ">" in arguments:  # as a shell runs it: the others would take as long, to import torch
            done = subprocess.run(
                command.replace("python ", f"{sys.executable} ", 1), shell=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, (command, done.stderr)
        else:
            assert script == "-m"
            _home_of(arguments[0]).main(arguments[1:])  # SystemExit if it fails
    assert len((cli.root / "answers.jsonl").read_text().splitlines()) == 2
    assert (cli.root / "merged/model.safetensors").is_file()
    assert (cli.root / "plain/adapter_model.safetensors").is_file()
    assert (made / "inspect/page.html").is_file()
