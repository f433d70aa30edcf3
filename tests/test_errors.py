"""Bad input: one clear sentence on stderr and exit code 1, before any training."""

import pytest
from command import CommandLine


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["variant=dorra"], "there is no variant=dorra; there are .* Did you mean dora?"),
        (["varient=dora"], "there is no key varient. Did you mean variant?"),
        (["train.stpes=3"], "there is no key train.stpes. Did you mean train.steps?"),
        (["rnak=3"], "there is no key rnak. Did you mean rank?"),
        (["model=tinny"], "there is no model=tinny; .* Did you mean tiny?"),
        (["variant.adapter.scalling=lora"], "Did you mean variant.adapter.scaling?"),
        (["rank=big"], "rank is 'big'; it must be a whole number."),
        (["train.steps=0"], "train.steps is 0; it must be positive."),
        (["train.compute_dtype=float8"], "must be float32 or bfloat16"),
        (["train.device=tpu"], "train.device is 'tpu'; it must be auto, cpu, cuda or cuda:n."),
        (["train.device=cuda:7"], "this machine has . CUDA devices"),
        (["variant.lr=-1"], "variant.lr is -1; it must be positive."),
        (["variant.lr=fast"], "variant.lr is 'fast'; it must be a number."),
        (["rank=999"], r"rank is 999; bert\S+ is \d+ x \d+, so it must lie in"),
        (["targets=[query,valeu]"], "'valeu' matches no layer of the model. Did you mean 'value'?"),
        (["targets=[query,LayerNorm]"], "is a LayerNorm; only nn.Linear can be adapted"),
        (["layers=[9]"], r"layers is \[9\]; this model's are 0 to 1."),
        (["layers=first:1"], "it must be all, last:n or a list of indices"),
        (["rank_pattern={qery: 4}"], "rank_pattern names 'qery', .* Did you mean 'query'?"),
        (["bias=some"], "bias is 'some'; it must be none, adapted or all."),
        (["dropout=1.5"], r"dropout is 1.5; it must lie in \[0, 1\)."),
        (["train_modules=[poller]"], "no module is named 'poller'. Did you mean 'pooler'?"),
        (["variant.adapter.scaling=big"], "scaling is 'big'; it must be 'lora' or 'rslora'."),
        (["variant.adapter.init_A=ones"], "init_A is 'ones'"),
        (["variant.groups.ratios={Q: 2}"], "the role 'Q', which nothing here plays; the roles are"),
        (["groups.module_rates={haed: 2}"], "module_rates names 'haed', .* Did you mean 'head'?"),
        (["schedule.warmup_frac=1"], r"schedule.warmup_frac is 1; it must lie in \[0, 1\)."),
        (["variant=full", "rank=4"], "rank is set, but variant 'full' ignores it"),
        (["variant=head", "dropout=0.1"], "dropout is set, but variant 'head' ignores it"),
        (["variant=bitfit", "bias=none"], "bias is set, but variant 'bitfit' ignores it"),
        (["+variant.adapter.rnk=4"], "would ignore the option rnk.* Did you mean 'rank'?"),
        (["variant=adalora", "variant.adapter.min_rank=9"], "min_rank"),
        (["variant=adalora", "variant.adapter.max_rank=4"], "max_rank"),
        (["variant=adalora", "variant.allocator.epsilon=1"], r"epsilon is 1.*\[0, 1\)"),
        (["variant=adalora", "variant.allocator.window=[0.5,1.2]"], "window"),
        (["variant=adalora", "variant.allocator.interval=50"], "interval"),
        (["model=hf"], "model.name"),
        (["model=hf", "model.name=some/hub-id"], "some/hub-id"),
        (["model=hf", "model.name=./nowhere"], "./nowhere"),
        (["model.dtype=float12"], "model.dtype is float12"),
        (["task.files.test=nowhere.csv"], "nowhere.csv"),
        (["foo"], "'foo' is no override; write key=value."),
        (["tracking.project=5"], "project"),
    ],
)  # fmt: skip
def test_one_sentence(cli, overrides, said):
    assert cli(*overrides) == 1, cli.out
    errors = [line for line in cli.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, cli.err
    assert "Traceback" not in cli.err
    import re

    assert re.search(said, errors[0]), errors[0]
    assert not list((cli.root / "outputs").rglob("result.json"))


def test_an_impossible_run_leaves_no_folder(cli):
    assert cli("rank=999") == 1
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
