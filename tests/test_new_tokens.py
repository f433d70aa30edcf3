"""Tokens that a base did not have: peft, autograd and transformers are the oracles."""

import copy
import json

import pytest
import torch
from adapters import config_of, write_language_task
from architectures import causal
from command import CommandLine
from safetensors.torch import load_file
from test_peft_architectures import by_peft, disturb, export, logits_of, saved, sizes
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.adapter import imported, merged, peft_format, start
from harness.adapter.folders import PEFT
from harness.adapter.restore import restore
from harness.config import build
from harness.memory.estimate import Estimator
from harness.models import new_tokens

peft = pytest.importorskip("peft")
TOKENS = ["<one>", "<two>"]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(params=["tied", "untied", "scaled"])
def folder(request, tmp_path):
    """Gemma's embedding is scaled in its forward pass."""
    more = {"tie_word_embeddings": request.param != "untied", "num_key_value_heads": 2}
    if request.param == "scaled":
        more |= {"head_dim": 8, "sliding_window": 8}
    kind = "gemma3_text" if request.param == "scaled" else "llama"
    return saved(tmp_path / "base", causal(kind, **sizes(vocab_size=259, **more)))


def ours(folder, *overrides, moved=True):
    config = config_of("model=hf", f"model.name={folder}", "rank=3", "alpha=6",
                       f"model.new_tokens={json.dumps(TOKENS)}", *overrides)  # fmt: skip
    base = build.load_base(config, None)
    layers = build.adapt(base, build.make_variant(config), config)
    if moved:
        disturb(base.model)
    return config, base, layers


def batch(ids):
    return {"input_ids": torch.tensor([[1, 70, ids[0], 91, ids[1]], [ids[1], 99, 120, 84, 2]])}


@torch.no_grad()
def answer(model, ids):
    return model.eval()(**batch(ids)).logits


def plain_of(folder, rows):
    """transformers' own model with as many rows."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def test_new_tokens_are_words_whose_rows_alone_are_trained(folder):
    _, base, layers = ours(folder, moved=False)
    ids = base.new_tokens
    assert base.tokenizer("x<two>y<one>").input_ids.count(ids[1]) == 1
    model, rows = base.model, new_tokens.rows(base.model)
    old = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    weight = model.get_input_embeddings().weight
    assert len(weight) == len(old) + 2 and torch.equal(weight[: len(old)], old)
    start = old.float().mean(0)
    assert ((weight[list(ids)] - start).abs() <= 0.05 * old.std(0)).all()
    assert not torch.equal(*weight[list(ids)])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.{n}" for path, layer in layers.items() for n in layer.roles()} | {
        f"{path}.token_rows" for path in rows
    }
    untied = model.lm_head.weight is not weight
    assert list(rows) == ["model.embed_tokens", *(["lm_head"] if untied else [])]

    disturb(model)
    plain = copy.deepcopy(model)  # whose whole matrices are the rows', by autograd
    merged.merge_into_base(plain, torch.float32).requires_grad_(True)
    for each in (model, plain):
        each.zero_grad()
        each.eval()(**batch(ids)).logits.square().mean().backward()
    for path in rows:
        found = model.get_submodule(path).token_rows.grad
        torch.testing.assert_close(
            found, plain.get_submodule(path).weight.grad[list(ids)], rtol=1e-4, atol=1e-6
        )
        assert found.abs().max() > 0


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_peft_computes_the_rows_of_new_tokens(folder, tmp_path, variant):
    config, base, layers = ours(folder, f"variant={variant}")
    ids, rows = base.new_tokens, len(base.model.get_input_embeddings().weight)
    written = export(tmp_path / "adapter", config, base, layers)
    about = json.loads((written / PEFT[0]).read_text())
    assert all(each == list(ids) for each in about["trainable_token_indices"].values())
    assert sum("token_adapter" in key for key in load_file(written / PEFT[1])) == len(
        new_tokens.rows(base.model)
    )
    expected = answer(copy.deepcopy(base.model), ids)
    model = peft.PeftModel.from_pretrained(plain_of(folder, rows), written)
    torch.testing.assert_close(answer(model, ids), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        answer(imported.restore(written).model, ids), expected, rtol=1e-4, atol=1e-5
    )
    config, fresh, layers = ours(folder, f"variant={variant}")
    start.start_from(written, fresh, layers, config)
    torch.testing.assert_close(answer(fresh.model, ids), expected, rtol=1e-4, atol=1e-5)

    merged.merge_into_base(base.model.float(), torch.float32).save_pretrained(tmp_path / "merged")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(answer(alone, ids), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("indices", [[6, 5], {"embed_tokens": [7, 90]}])
def test_trained_tokens_of_peft_are_read(folder, tmp_path, indices):
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = logits_of(copy.deepcopy(plain))
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM",
                             trainable_token_indices=indices)  # fmt: skip
    model = peft.get_peft_model(plain, config)
    disturb(model, seed=6)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits_of(by_peft(tmp_path / "adapter", folder))
    found = logits_of(imported.restore(tmp_path / "adapter").model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 0.01
    config, base, layers = ours(folder, "targets=[q_proj]")
    with pytest.raises(ValueError, match=r"trained tokens \[.*\] of .*; set model.new_tokens"):
        start.start_from(tmp_path / "adapter", base, layers, config)


def test_an_output_layer_with_a_bias(tmp_path):
    """Phi's, which PEFT leaves out of the logits where tokens are trained."""
    folder = saved(tmp_path / "base", causal("phi", **sizes(vocab_size=259)))
    config, base, layers = ours(folder)
    expected = answer(copy.deepcopy(base.model), base.new_tokens)
    with pytest.raises(peft_format.NotLowRank, match="lm_head has a bias, which PEFT leaves out"):
        export(tmp_path / "adapter", config, base, layers)
    merged.merge_into_base(base.model, torch.float32)
    torch.testing.assert_close(answer(base.model, base.new_tokens), expected, rtol=1e-4, atol=1e-5)


def test_new_tokens_that_are_none(folder):
    for given, message in (
        ("[a,a]", "each must be given once"), ("x", "it must be a list of words"),
        ('["</s>"]', "tokenizer of .* knows already"), ("[3]", "each must be a word"),
    ):  # fmt: skip
        config = config_of("model=hf", f"model.name={folder}", f"model.new_tokens={given}")
        with pytest.raises(ValueError, match=rf"model.new_tokens .*{message}"):
            build.load_base(config, None)
    for whole in ("targets=[embed_tokens]", "train_modules=[embed_tokens]", "targets=[lm_head]"):
        with pytest.raises(ValueError, match=r"rows of new tokens in .* beside the whole matrix"):
            ours(folder, whole)


def test_a_run_with_new_tokens(tmp_path, monkeypatch, capsys):
    run = CommandLine(tmp_path, monkeypatch, capsys)
    task = write_language_task(tmp_path)
    for split in ("train", "validation", "test"):
        path = tmp_path / f"{split}.jsonl"
        path.write_text(path.read_text().replace(" + ", " <plus> "))
    given = [*task, 'model.new_tokens=["<plus>"]', "variant=dora", "train.eval_every=4"]
    assert run(*given) == 0, run.err
    made = run.folders()[0]
    restored = restore(made)
    ids = restored.base.new_tokens
    assert ids and restored.base.tokenizer("a<plus>b").input_ids.count(ids[0]) == 1
    rows = new_tokens.rows(restored.model)["model.embed_tokens"][1]
    assert (rows - restored.model.get_input_embeddings().weight[list(ids)]).abs().max() > 1e-4
    report = merged.export_merged(made, tmp_path / "merged")
    assert report
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    inputs = tokenizer("3 <plus> 4", return_tensors="pt")
    assert ids[0] in inputs.input_ids
    with torch.no_grad():
        found, expected = (
            model(input_ids=inputs.input_ids).logits for model in (alone, restored.model.eval())
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    config = config_of(*given)
    assert Estimator(config, None).parameters_total > 0
