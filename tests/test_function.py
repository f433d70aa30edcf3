"""A base is more than its tensors: what else defines its function is held, checked and printed."""

import dataclasses
import json
import shutil

import pytest
import torch
from adapters import write_adapter
from command import CommandLine
from test_models import LABELS, checkpoint, logits

from harness.adapter import start
from harness.adapter.restore import restore
from harness.compare.held import check_held
from harness.compare.rows import read_folder
from harness.disk.digest import digest
from harness.models import hf


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def edit(folder, name: str, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    path = folder / name
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


# ---- what counts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"num_attention_heads": 2}, "num_attention_heads"),
        ({"layer_norm_eps": 0.1}, "layer_norm_eps"),
        ({"hidden_dropout_prob": 0.5}, "hidden_dropout_prob"),
        ({"use_cache": False}, None),
        ({"architectures": ["Bert"], "transformers_version": "4.0.0", "_name_or_path": "x"}, None),
        ({"dtype": "bfloat16", "id2label": {"0": "a"}, "label2id": {"a": 0}}, None),
    ],
    ids=str,
)
def test_an_edited_configuration_is_another_base_where_it_computes_something_else(
    tmp_path, changes, key
):
    """The oracle is the model: the same tensors, in training mode, give other numbers."""

    def run() -> tuple:
        base = hf.load(labels=LABELS, seed=0, name=name)
        torch.manual_seed(0)
        base.model.train()  # where dropout computes something
        return base, logits(base)

    name = checkpoint(tmp_path)
    before, answers = run()
    edit(tmp_path, "config.json", **changes)
    after, others = run()
    assert after.sha256 == before.sha256 and after.tokenizer_sha256 == before.tokenizer_sha256
    same = after.fingerprints["function"] == before.fingerprints["function"]
    assert torch.equal(answers, others) == same == (key is None)
    if key:
        assert {k for k, v in after.definition["config"].items()
                if before.definition["config"].get(k) != v} == {key}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("generation_config.json", {"eos_token_id": 7}),
        ("tokenizer_config.json", {"chat_template": "{{ messages[0]['content'] }}"}),
        ("tokenizer_config.json", {"eos_token": "a"}),
        ("tokenizer_config.json", {"model_max_length": 20}),
        ("tokenizer_config.json", {"truncation_side": "left"}),
        ("config.json", {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}),
    ],
    ids=str,
)
def test_settings_of_generation_and_of_the_tokenizer_belong_to_a_language_model(
    tmp_path, file, changes
):
    name = checkpoint(tmp_path, "Llama", "ForCausalLM", "llama")
    before = hf.load(labels=None, seed=0, name=name)
    edit(tmp_path, file, **changes)
    after = hf.load(labels=None, seed=0, name=name)
    assert after.sha256 == before.sha256
    assert after.fingerprints["function"] != before.fingerprints["function"]


@pytest.mark.parametrize(("family", "labels"), [("Bert", LABELS), ("Llama", None)])
def test_a_base_has_one_function_wherever_it_lies_and_however_it_is_read(tmp_path, family, labels):
    kind = "Model" if labels else "ForCausalLM"
    name = checkpoint(tmp_path / "one", family, kind, family.lower())
    shutil.copytree(name, tmp_path / "two")
    one = hf.load(labels=labels, seed=0, name=name)
    two = hf.load(labels=labels, seed=1, name=str(tmp_path / "two"), streamed=True)
    half = hf.load(labels=labels, seed=0, name=name, dtype="bfloat16")
    assert one.definition == two.definition == half.definition
    assert str(tmp_path) not in json.dumps(one.definition)
    classes = {hf.load(labels=LABELS, seed=0, name=name).definition["class"]}
    classes.add(one.definition["class"])
    assert len(classes) == (1 if labels else 2)  # a classifier of it computes something else


# ---- what is refused -----------------------------------------------------------------------------


def test_a_run_on_a_base_with_other_settings_is_refused_and_told_apart(cli, tmp_path, monkeypatch):
    base = tmp_path / "base"
    model = ["model=hf", f"model.name={checkpoint(base)}", "variant=lora"]
    assert cli(*model) == 0, cli.err
    (run,) = cli.folders()
    assert cli(*model) == 0 and "is complete already" in cli.out
    parts = tmp_path / "parts"
    (shutil.copytree(run, parts)).joinpath("result.json").unlink()
    edit(base, "config.json", hidden_act="relu")
    for where in ((), (f"run_dir={parts}",)):  # finished, and not
        assert cli(*model, *where) == 1
        assert "the function of the base changed since" in cli.err
        assert "(config.hidden_act is 'relu', was 'gelu')" in cli.err
    assert cli(*model, f"run_dir={tmp_path / 'other'}") == 0, cli.err
    one, two = cli.result(run), cli.result(tmp_path / "other")
    assert one["run_key"] == two["run_key"] and one["control_hash"] != two["control_hash"]
    runs = [read_folder(folder, "lora", "compare") for folder in (run, tmp_path / "other")]
    with pytest.raises(ValueError, match=r"base\.config\.hidden_act: 'gelu' and 'relu'"):
        check_held(runs)


def test_an_archive_of_before_functions_were_recorded_is_continued(cli, tmp_path):
    """Its rows are held against the new ones by what both say; new ones against each other."""
    base = tmp_path / "base"
    model = ["model=hf", f"model.name={checkpoint(base)}", "train.steps=2", "train.eval_every=2"]
    assert cli(*model, "seed=0") == 0 and cli(*model, "seed=1") == 0, cli.err
    one, two = (read_folder(folder, "lora", "compare") for folder in cli.folders())
    old = {k: v for k, v in one.result.items() if k != "definition"}
    old["fingerprints"] = {k: v for k, v in old["fingerprints"].items() if k != "function"}
    archived = dataclasses.replace(one, result=old)
    check_held([archived, two])
    check_held([archived, archived])
    changed = {**two.result, "fingerprints": {**two.result["fingerprints"], "function": "0" * 64}}
    with pytest.raises(ValueError, match=r"fingerprints\.function"):
        check_held([archived, two, dataclasses.replace(two, result=changed)])
    other = {**two.result, "fingerprints": {**two.result["fingerprints"], "base": "0" * 64}}
    with pytest.raises(ValueError, match=r"fingerprints\.base: .*") as refused:
        check_held([archived, dataclasses.replace(two, result=other)])
    assert "base.config" not in str(refused.value)  # of which one row says nothing


# ---- adapters ------------------------------------------------------------------------------------


def test_an_adapter_is_bound_to_the_function_of_its_base(tmp_path):
    name = checkpoint(tmp_path / "base")
    run = write_adapter(tmp_path / "run", "model=hf", f"model.name={name}", "variant=lora")
    assert restore(run).notes == ()
    edit(tmp_path / "base", "config.json", hidden_act="relu")
    with pytest.raises(ValueError, match=r"the function of .* which the adapter was trained on"):
        restore(run)
    assert "the function of" in restore(run, force=True).notes[0]


def test_an_adapter_of_before_functions_were_recorded_is_restored_with_a_note(tmp_path):
    """As it was written: its fingerprints are of data, tensors and tokenizer."""
    name = checkpoint(tmp_path / "base")
    run = write_adapter(tmp_path / "run", "model=hf", f"model.name={name}", "variant=lora")
    path = run / "adapter/native.json"
    about = json.loads(path.read_text())
    del about["fingerprints"]["function"], about["sha256"]
    path.write_text(json.dumps({**about, "sha256": digest(about)}))
    edit(tmp_path / "base", "config.json", hidden_act="relu")
    restored = restore(run)
    (note,) = restored.notes
    assert "its tensors and its tokenizer alone are checked" in note
    assert start.start_from(run, restored.base, restored.layers, restored.config)
    checkpoint(tmp_path / "base", intermediate_size=57)  # other tensors
    with pytest.raises(ValueError, match=r"the base of .* differ"):
        restore(run)
