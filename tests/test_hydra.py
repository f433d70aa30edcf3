"""Hydra's promises on this command line: composition, help, completion, sweeps, overlays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import CommandLine
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
OPTIONS = sorted(
    f"{file.parent.name}={file.stem}" for file in CONF.glob("*/*.yaml") if file.parent.name
)


def composed(*overrides: str) -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", list(overrides)), resolve=True)


def python(*arguments: str, **variables: str) -> str:
    """Returns the output of a fresh interpreter, in the repository's root."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


# ---- composition --------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes(option):
    group, _, name = option.partition("=")
    config = composed(option)
    assert group == "experiment" or set(composed()) == set(config)
    if group == "variant":
        assert config["variant"]["name"] == name


def test_an_experiment_is_an_overlay_and_the_command_line_has_the_last_word():
    config = composed("experiment=quick", "variant=dora", "train.eval_every=20")
    assert config["train"]["steps"] == 60 and config["train"]["eval_every"] == 20
    assert config["variant"]["name"] == "dora"
    assert config["train"]["batch_size"] == composed()["train"]["batch_size"]
    assert "experiment" not in config


def test_the_job_is_shown_resolved(cli):
    assert cli.exactly("variant=dora", "rank=4", "--cfg", "job", "--resolve") == 0, cli.err
    config = OmegaConf.to_container(OmegaConf.create(cli.out))
    assert config["variant"]["adapter"]["rank"] == config["rank"] == 4
    assert "${" not in cli.out


# ---- help and completion ------------------------------------------------------------------------


def test_help_names_the_groups(cli):
    assert cli.exactly("--help") == 0, cli.err
    for group in ("variant", "model", "task", "optimizer", "schedule", "tracking", "experiment"):
        assert f"\n{group}: " in cli.out
    assert "qdora" in cli.out and "quick" in cli.out


def test_the_command_line_starts_without_torch():
    code = "import sys, train, harness.study.pool; print('torch' in sys.modules)"
    assert python("-c", code) == "False\n"  # nor does the launcher of a multirun need it


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("variant=do", {"variant=dora"}),
        ("variant=q", {"variant=qlora", "variant=qdora", "variant=qadalora"}),
        ("experiment=qui", {"experiment=quick"}),
        ("train.st", {"train.steps="}),
    ],
)
def test_the_shell_completes(typed, completed):
    out = python("train.py", "-sc", "query=bash", COMP_LINE=f"python train.py {typed}")
    assert set(out.split()) == completed


# ---- sweeps -------------------------------------------------------------------------------------


def test_a_sweep_over_a_glob_runs_every_variant(cli, monkeypatch):
    import train

    seen = []
    monkeypatch.setattr(train, "run", lambda config, **_: seen.append(config["variant"]["name"]))
    assert cli("-m", "variant=glob(*)") == 0, cli.err
    assert seen == sorted(file.stem for file in (CONF / "variant").glob("*.yaml"))


def test_a_key_that_one_swept_variant_lacks(cli):
    assert cli("-m", "variant=dora,lora", "variant.adapter.detach_norm=false") == 1
    assert cli.err == (
        "error: variant=lora has no key variant.adapter.detach_norm; sweep the variants that have "
        "it apart.\n"
    )


def test_a_glob_is_checked_variant_by_variant(cli):
    assert cli("-m", "variant=glob(q*)", "variant.adapter.detach_norm=false") == 1
    assert "variant=qadalora has no key variant.adapter.detach_norm" in cli.err
    assert cli("-m", "variant=dora,qdora", "variant.adapter.detach_nrm=false") == 1
    assert "Did you mean variant.adapter.detach_norm?" in cli.err
