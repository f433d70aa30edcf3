"""Bad input: one clear sentence on stderr and exit code 1, before any training."""

import functools
import importlib
import os
import re

import pytest
import torch
from command import CommandLine

import variants
from harness.config.overrides import FROM_HOME, as_text, flags_first, from_home
from harness.config.settings import check_call
from harness.disk import cache
from harness.loop import schedule
from harness.models import tiny
from harness.tasks import forgetting


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["variant=dorra"], "there is no variant=dorra; there are .* Did you mean dora?"),
        (["varient=dora"], "there is no key varient. Did you mean variant?"),
        (["train.stpes=3"], "there is no key train.stpes. Did you mean train.steps?"),
        (["model=tinny"], "there is no model=tinny; .* Did you mean tiny?"),
        (["variant.adapter.scalling=lora"], "Did you mean variant.adapter.scaling?"),
        (["rank=${nothing}"], "error: Interpolation key 'nothing' not found"),
        (["rank=big"], "rank is 'big'; it must be a whole number."),
        (["train.steps=0"], "train.steps is 0; it must be positive."),
        (["train.compute_dtype=float8"], "must be float32 or bfloat16"),
        (["train.device=tpu"], "train.device is 'tpu'; it must be auto, cpu, cuda or cuda:n."),
        (["train.device=cuda:7"], "this machine has . CUDA devices"),
        (["variant.lr=-1"], "variant.lr is -1; it must be positive."),
        (["variant.lr=fast"], "variant.lr is 'fast'; it must be a number."),
        (["rank=999"], r"rank is 999; bert\S+ is \d+ x \d+, so it must lie in"),
        (["targets=[query,valeu]"], "'valeu' matches no layer of the model. Did you mean 'value'?"),
        (["bias=some"], "bias is 'some'; it must be none, adapted or all."),
        (["variant.adapter.scaling=big"], "scaling is 'big'; it must be 'lora' or 'rslora'."),
        (["variant.adapter.init_A=ones"], "init_A is 'ones'"),
        (["schedule.warmup_frac=1"], r"schedule.warmup_frac is 1; it must lie in \[0, 1\)."),
        (["variant=full", "rank=4"], "rank is set, but variant 'full' ignores it"),
        (["variant=head", "dropout=0.1"], "dropout is set, but variant 'head' ignores it"),
        (["variant=bitfit", "bias=none"], "bias is set, but variant 'bitfit' ignores it"),
        (["+variant.adapter.rnk=4"], "would ignore the option rnk.* Did you mean 'rank'?"),
        (["variant=adalora", "variant.adapter.min_rank=9"], "min_rank"),
        (["variant=adalora", "variant.adapter.max_rank=4"], "max_rank"),
        (["model=hf"], "model.name"),
        (["model=hf", "model.name=some/hub-id"], "some/hub-id"),
        (["model=hf", "model.name=./nowhere"], "./nowhere"),
        (["model.dtype=float12"], "model.dtype is float12"),
        (["task.files.test=nowhere.csv"], "nowhere.csv"),
        (["layers=[a]"], r"layers is \['a'\]; it must be all, last:n or a list of indices."),
        (["targets=3"], "targets is 3; it must be all-linear, attention, mlp, experts, or names"),
        (["rank_pattern={query: big}"], "rank is 'big'; it must be a whole number."),
        (["alpha_pattern={query: x}"], "alpha is 'x'; it must be a number."),
        (["alpha=0"], "alpha is 0; it must be positive."),
        (["variant=adalora", "alpha=0"], "alpha is 0; it must be positive."),
        (["variant=adalora_budget", "alpha=0"], "alpha is 0; it must be positive."),
        (["variant.adapter.init_gain=x"], "init_gain is 'x'; it must be a number."),
        (["variant=dora", "variant.adapter.detach_norm=x"], "detach_norm is 'x'; it must be true"),
        (["schedule.warmup_frac=x"], "schedule.warmup_frac is 'x'; it must be a number."),
        (["schedule.warmup_frac=0.96"], "which leaves none of 8 steps after the warm-up"),
        (["groups.module_rates=true"], "module_rates is True; it must be a mapping or null."),
        (["variant.groups=1.9"], "variant.groups is 1.9; it must be a mapping with a _target_."),
        (["optimizer.betas=1"], "optimizer does not take betas=1"),
        (["task.signal_rows=x"], "signal_rows is 'x'; it must be a whole number."),
        (["task.max_tokens=1.5"], "max_tokens is 1.5; it must be a whole number."),
        (["tracking=offline", "tracking.project=5"], "tracking.project is 5; it must be text."),
        (["train_modules=[3]"], "an entry of train_modules is 3; it must be text."),
        (["variant=adalora", "variant.allocator.epsilon=x"], "epsilon is 'x'; it must be a number"),
        (["variant=adalora", "variant.allocator.interval=1.5"], "interval is 1.5; it must be"),
        (["variant=adalora_budget", "variant.allocator.target_frac=x"], "target_frac is 'x'"),
        (["variant=bitfit", "layers=last:1"], "choose nothing that variant 'bitfit' trains"),
        (["variant.penalty_weight=0.5"], "the layers of variant 'lora' have no penalty"),
        (["variant.penalty_weight=x"], "penalty_weight is 'x'; it must be a number."),
        (["variant=dora", "variant.adapter.magnitude_dropout=true"], "but dropout is 0"),
        (["+variant.adapter.path=x"], "would ignore the option path"),
        (["-m", "variant=lora,dora", "variant.adapter.detach_norm=false"], "variant=lora has no k"),
        (["groups.module_rates={}"], "would empty nothing: Hydra merges mappings"),
        (["-m", "hydra/sweeper=fiar"], "no hydra/sweeper=fiar; .* Did you mean fair?"),
        (["-m", "hydra/launcher=proceses"], "hydra/launcher=proceses; .* mean processes"),
        (["-m", "hydra/sweeper=fair", "hydra.sweeper.seedz=[1]"], "Did you mean hydra.sweeper.see"),
        (["-m", "hydra.launcher.n_job=2", "hydra/launcher=processes"], "hydra.launcher.n_jobs"),
        (["foo"], "'foo' is not an override; write key=value."),
        (["--variant", "dora"], "--variant is no flag; a setting is written key=value."),
        (["rank=4,8"], r"rank=4,8 gives several values; add -m to run each, or write \[a,b\]"),
        (["variant=glob(*)"], "gives several values; add -m"),
        (["scaling=rslora"], "Did you mean variant.adapter.scaling?"),
        (["train.lr=1"], "there is no key train.lr. Did you mean variant.lr?"),
        (["variant.rank=4"], "variant.rank is called rank; write rank=4."),
        (["variant.adapter._partial_=false"], "_partial_ is no setting: it says how conf/ is read"),
        (["++optimizer._convert_=foo"], "_convert_ is no setting"),
        (["model._target_=nowhere.x"], "a command line may choose what conf/model has: .*tiny"),
        (["variant.adapter._target_=os.system"], "_target_ is 'os.system'; a command line may"),
        (["variant.store._target_=torch.nn.Linear"], "what conf/variant has: .*DenseStore, "),
        (["+train.stepz=1"], "there is no key train.stepz. Did you mean train.steps?"),
        (["+rank=4"], "there is a key rank already; write it without +."),
        (["~train.steps"], "~train.steps would take away what a run reads; set it instead."),
        (["experiment=../variant/lora"], "there is no experiment=../variant/lora; there are"),
        (["variant=base/low_rank"], "there is no variant=base/low_rank"),
        (["variant.name=../../x"], "variant.name is '../../x'; it names folders"),
    ],
)  # fmt: skip
def test_one_sentence(cli, overrides, said):
    assert cli(*overrides) == 1, cli.out
    errors = [line for line in cli.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, cli.err
    assert "Traceback" not in cli.err
    assert re.search(said, errors[0]), errors[0]
    assert not (cli.root / "outputs").exists()


def test_a_model_folder_without_weights(cli):
    folder = cli.root / "empty"
    folder.mkdir()
    assert cli("model=hf", f"model.name={folder}") == 1
    assert str(folder) in cli.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "train.csv"),
        ("text,label\n", "train.csv"),
        ("words,label\nx,good\n", "text"),
        ('text,label\n"",good\nfine,bad\n', "train.csv, line 2"),
        ("text,label\nfine,good\n", "class"),
    ],
)
def test_bad_data_names_the_file(cli, content, said):
    (cli.root / "data/train.csv").write_text(content)
    assert cli("variant=lora") == 1
    assert cli.err.startswith("error: ") and said in cli.err, cli.err


def test_a_label_unseen_in_train(cli):
    with open(cli.root / "data/test.csv", "a") as file:
        file.write("fine,goood\n")
    assert cli("variant=lora") == 1
    assert "goood" in cli.err and "good" in cli.err


@pytest.mark.parametrize(
    ("call", "keywords", "said"),
    [
        (torch.optim.AdamW, {"eps": 1e-8, "foo": 1}, "would ignore the option foo"),
        (torch.optim.AdamW, {"defaults": 1}, "would ignore the option defaults"),  # of its base
        (torch.optim.AdamW, {"weight_deacy": 1}, "Did you mean 'weight_decay'?"),
        (tiny.load, {"architecture": "bert", "foo": 1}, "would ignore the option foo"),
        (tiny.load, {"seed": 3}, "would ignore the option seed"),
        (variants.DenseStore, {"foo": 1}, "would ignore the option foo"),
        (variants.by_role, {"foo": 1}, "would ignore the option foo"),
        (variants.by_role, {"ratio": 1}, "Did you mean 'ratios'?"),
        (variants.DoraLinear, {"init_gian": 1}, "Did you mean 'init_gain'?"),  # of its base
        (schedule.linear, {"foo": 1}, "would ignore the option foo"),
    ],
)
def test_an_option_that_a_call_does_not_take(call, keywords, said):
    with pytest.raises(ValueError) as error:
        check_call(functools.partial(call, **keywords), "here", given=("seed",))
    assert str(error.value).startswith("here would ignore") and said in str(error.value)


@pytest.mark.parametrize(
    ("call", "keywords"),
    [
        (torch.optim.AdamW, {"betas": (0.9, 0.99), "fused": True}),
        (variants.DoraLinear, {"detach_norm": False, "init_A": "zero", "dropout": 0.1}),
        (schedule.cosine, {"warmup_frac": 0.1}),
        (dict, {"anything": 1}),
    ],
)
def test_options_that_a_call_takes(call, keywords):
    check_call(functools.partial(call, **keywords), "here")


# ---- paths and names, as they are typed ----------------------------------------------------------


def read_by_hydra(argument):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(as_text(argument))


@pytest.mark.parametrize("quote", ["", "'", '"'])
@pytest.mark.parametrize("key", [*FROM_HOME, "model.name", "task.files.train", "+task.files.x"])
def test_a_tilde_is_read_in_every_path_setting(key, quote, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere/else")
    found = read_by_hydra(f"{key}={quote}~/a b.jsonl{quote}").value()
    assert os.path.expanduser(found) == "/somewhere/else/a b.jsonl"
    assert found == (os.path.expanduser(found) if key in FROM_HOME else "~/a b.jsonl")
    several = read_by_hydra(f"{key}=~/a,b,{quote}~/c{quote}")
    assert several.is_sweep_override() and len(list(several.sweep_iterator())) == 3
    assert as_text("~train.steps") == "~train.steps" and as_text("--cfg=~") == "--cfg=~"


def test_a_tilde_of_an_overlay_is_read_in_every_path_setting(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere/else")
    config = {"outputs_dir": "~/a", "run_dir": None, "init_from": "b", "seed": 0}
    expected = {**config, "outputs_dir": "/somewhere/else/a"}
    assert from_home(config) is config and config == expected


def test_the_flag_of_a_multirun_may_stand_anywhere():
    """Hydra reads overrides on one side of a flag alone."""
    typed = ["rank=1", "-m", "seed=0,1", "--cfg", "job"]
    assert flags_first(typed) == ["-m", "rank=1", "seed=0,1", "--cfg", "job"]
    assert flags_first(typed[2:]) == typed[2:]


NAMES = ["2024", "007", "1e3", "1_000", "12.0", "-3", "nan", "inf", "2024.", ".5"]


@pytest.mark.parametrize("name", NAMES)
def test_a_number_is_text_where_text_is_meant(name):
    for key in ("model.name", "task.files.test", "run_dir", "task.splits.test", "init_from"):
        assert read_by_hydra(f"{key}={name}").value() == name
    assert read_by_hydra("model.name=null").value() is None
    assert read_by_hydra("model.name='2024'").value() == "2024"
    assert read_by_hydra("rank=2024").value() == 2024
    assert list(read_by_hydra("model.name=1,x,2").sweep_string_iterator()) == ["'1'", "x", "'2'"]


def test_a_folder_may_be_called_like_a_number(cli, monkeypatch):
    monkeypatch.chdir(cli.root)
    monkeypatch.setenv("HOME", str(cli.root))
    assert cli("outputs_dir=2024", "task.files.train=~/data/train.csv") == 0, cli.err
    assert list((cli.root / "2024").rglob("result.json"))
    (run,) = (path.parent for path in (cli.root / "2024").rglob("result.json"))
    assert cli("init_from=~/" + str(run.relative_to(cli.root)), "run_dir=~/again") == 0, cli.err
    assert (cli.root / "again" / "result.json").is_file() and not (cli.root / "~").exists()


def test_a_tilde_is_read_in_a_multirun_too(cli, monkeypatch):
    monkeypatch.setenv("HOME", str(cli.root))
    several = "task.files.test=~/data/test.csv,'~/data/validation.csv'"
    assert cli("-m", several, "train.steps=1", "train.eval_every=1") == 0, cli.err
    found = [cli.result(folder)["test"]["n"] for folder in cli.folders()]
    assert sorted(found) == [12, 14]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=hf", "model.name=2024"], "'2024'|the model 2024"),
        (["model=hf", "model.name=true"], r"model.name is true; it must be text, such as"),
        (["task.files.train=2024"], r"2024: the extension must be one of"),
        (["task.files.train=true"], r"task.files.train is true; it must be text, such as"),
    ],
)
def test_what_is_no_name_is_one_sentence(cli, overrides, said):
    assert cli(*overrides) == 1, cli.out
    (error,) = [line for line in cli.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in cli.err and re.search(said, error), error


def test_a_held_out_text_that_is_no_name_is_told():
    with pytest.raises(ValueError, match=r"task.held_out_text is 2024; it must be text, such as"):
        forgetting.read_text(2024)


@pytest.mark.parametrize(
    "module",
    [
        "adapter.predict",
        "adapter.evaluate",
        "adapter.export",
        "inspect.__main__",
        "compare.__main__",
    ],
)
def test_the_other_command_lines_read_a_tilde_too(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    main = importlib.import_module(f"harness.{module}").main
    more = {"adapter.predict": ["--text", "x"], "adapter.export": ["--merged", "~/out"]}
    with pytest.raises(SystemExit) as stop:
        main(["~/nothing", *more.get(module, [])])
    said = f"{stop.value.code} {capsys.readouterr().err}"
    assert f"{tmp_path}/nothing" in said and "~" not in said


def test_the_cache_may_be_named_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LORA_VARIANTS_CACHE", "~/mine")
    assert cache.folder() == tmp_path / "mine"
