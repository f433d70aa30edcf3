"""Checkpoints that bitsandbytes wrote: read to the bit, adapted, and written; against it."""

import json
import shutil
import warnings

import architectures
import bitsandbytes.functional as bnb
import pytest
import torch
from adapters import config_of, write_adapter
from command import CommandLine, write_task
from safetensors.torch import load_file, save_file
from templates import save_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

import variants
from harness.adapter.merged import export_merged, save
from harness.adapter.restore import restore
from harness.config import build
from harness.memory.estimate import Estimator
from harness.models import hf
from harness.models.quantised import StoredLinear
from variants import DenseStore, Int8Store, Nf4Store
from variants.layer import UnadaptedLinear

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                   "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}  # fmt: skip
READ = ["nf4", "nf4 double", "int8"]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "pad_token_id": 0}
IDS = torch.tensor([[3, 14, 15, 9, 26, 5], [35, 8, 9, 7, 9, 3]])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Kind -> the folder that transformers and bitsandbytes have written; `dense`: what from."""
    root = tmp_path_factory.mktemp("quantised")
    dense = save_model(root / "dense", "llama3", **SIZES)
    found = {"dense": dense}
    for kind, settings in KINDS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(
                dense, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
            )
        shutil.copytree(dense, root / kind)
        model.save_pretrained(root / kind)
        found[kind] = str(root / kind)
    return found


def theirs(folder, auto=AutoModelForCausalLM):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_pretrained(folder, device_map="cpu")
    return model.train()  # drops nothing; in evaluation its CPU kernel would compute in bfloat16


def dequantised(folder) -> dict[str, torch.Tensor]:
    """Path -> the dense matrix in float32, by bitsandbytes."""
    found = {}
    for path, module in theirs(folder).named_modules():
        weight = getattr(module, "weight", None)
        if (state := getattr(weight, "quant_state", None)) is not None:
            found[path] = bnb.dequantize_4bit(weight.data, state).float()
        elif getattr(weight, "SCB", None) is not None:
            found[path] = bnb.int8_vectorwise_dequant(weight.data, weight.SCB)
    return found


@pytest.mark.parametrize("kind", READ)
def test_a_checkpoint_is_read_to_the_bit_and_never_dense(checkpoints, kind, monkeypatch):
    expected = dequantised(checkpoints[kind])
    assert len(expected) == 14
    dense = []
    for store in (Int8Store, Nf4Store):
        real = store.dequantize
        monkeypatch.setattr(
            store, "dequantize", lambda *a, real=real: dense.append(a) or real(*a)
        )  # fmt: skip
        monkeypatch.setattr(store, "__init__", None)  # nothing is quantised again
    base = hf.load(labels=None, seed=0, name=checkpoints[kind])
    assert not dense and base.quantised
    assert any(f"is kept in {'8' if kind == 'int8' else '4'} bits" in note for note in base.notes)
    kept = {p: m.store for p, m in base.model.named_modules() if isinstance(m, StoredLinear)}
    assert kept.keys() == expected.keys()
    for path, store in kept.items():
        assert torch.equal(store.dequantize(torch.float32), expected[path]), path
        double = getattr(store, "double_quantization", None)
        assert double == {"nf4": False, "nf4 double": True, "int8": None}[kind]
    plain = hf.load(labels=None, seed=0, name=checkpoints["dense"])
    assert plain.fingerprints["function"] == base.fingerprints["function"]
    assert plain.sha256 != base.sha256 and not plain.quantised


@pytest.mark.parametrize("kind", READ)
def test_its_logits_are_those_of_its_dense_matrices(checkpoints, kind):
    """And for NF4 bitsandbytes' own; in 8 bits it rounds the inputs too."""
    base = hf.load(labels=None, seed=0, name=checkpoints[kind])
    plain = hf.load(labels=None, seed=0, name=checkpoints["dense"]).model
    for path, weight in dequantised(checkpoints[kind]).items():
        plain.get_submodule(path).weight.data = weight
    with torch.no_grad():
        found = base.model(IDS).logits
        torch.testing.assert_close(found, plain(IDS).logits)
        tolerance = 2e-2 if kind == "int8" else 1e-5
        torch.testing.assert_close(
            found, theirs(checkpoints[kind])(IDS).logits, atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("variant", ["lora", "dora", "adalora", "adalora_budget", "full"])
def test_every_kind_of_variant_stands_on_its_store(checkpoints, variant):
    """As on the same values kept dense; what is not adapted stays in its store."""
    labels, found = ["a", "b"], {}
    for dense in (False, True):
        config = config_of(
            f"variant={variant}", "model=hf", f"model.name={checkpoints['nf4 double']}",
            "targets=attention",
        )  # fmt: skip
        base = build.load_base(config, labels)
        if dense:
            for path, module in list(base.model.named_modules()):
                if isinstance(module, StoredLinear):
                    weight = module.store.dequantize(torch.float32)
                    linear = torch.nn.Linear(*weight.T.shape, bias=False)
                    linear.weight.data = weight
                    base.model.set_submodule(path, linear)
        layers = build.adapt(base, build.make_variant(config), config)
        assert len(layers) == 8
        if not dense:
            assert all(
                isinstance(layer.store, Nf4Store) for layer in layers.values() if layer.store
            )
            mlp = base.model.get_submodule("model.layers.0.mlp.up_proj")
            assert isinstance(mlp, UnadaptedLinear) and isinstance(mlp.store, Nf4Store)
            assert not any(p.is_meta for p in base.model.parameters())
        variants.begin_step(layers, 1)
        for layer in layers.values():
            for parameter in layer.roles().values():
                parameter.data += 0.02 * torch.ones_like(parameter)
        logits = base.model(IDS).logits
        logits.square().sum().backward()
        gradients = [p.grad for layer in layers.values() for p in layer.roles().values()]
        found[dense] = [logits.detach(), *(g for g in gradients if g is not None)]
    for one, other in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_store_of_another_kind_is_refused_and_one_of_its_own_is_taken(checkpoints):
    def layers(variant, kind):
        overrides = (f"variant={variant}", "model=hf", f"model.name={checkpoints[kind]}")
        config = config_of(*overrides)
        base = build.load_base(config, None)
        return build.adapt(base, build.make_variant(config), config).values()

    assert not any(layer.store.double_quantization for layer in layers("qlora", "nf4"))
    with pytest.raises(ValueError, match=r"'qlora' keeps .* Nf4Store, but the base .* Int8Store"):
        layers("qlora", "int8")
    with pytest.raises(ValueError, match=r"use a variant without a store of its own"):
        layers("lora8bit", "nf4")


@pytest.mark.parametrize(
    ("settings", "method"),
    [({"quant_method": "gptq"}, "GPTQ"), ({"quant_method": "awq"}, "AWQ"),
     ({"quant_method": "fp8"}, "FP8"), ({"quant_method": "compressed-tensors"}, "COMPRESSED"),
     ({**KINDS["fp4"], "quant_method": "bitsandbytes"}, "FP4")],
)  # fmt: skip
def test_other_quantisations_say_what_to_load_instead(tmp_path, settings, method):
    folder = save_model(tmp_path, "llama3")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    for load in (
        lambda: hf.load(labels=None, seed=0, name=folder),
        lambda: hf.outline(labels=None, name=folder),
    ):
        with pytest.raises(ValueError, match=f"quantised already, in {method}.*variant=qlora"):
            load()
    said = {**config, "quantization_config": {**KINDS["nf4"], "quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="none of its weights is quantised; take it out"):
        hf.load(labels=None, seed=0, name=folder)


def drop(name):
    return lambda tensors: tensors.pop(name)


PROJ = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{PROJ}.quant_state.bitsandbytes__nf4"


def of_state(**changed):
    def change(tensors):
        state = {**json.loads(bytes(tensors[STATE].tolist())), **changed}
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def put(name, change):
    def changed(tensors):
        tensors[name] = change(tensors[name]).contiguous()

    return changed


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop(f"{PROJ}.absmax"), "absmax"),
        (put(f"{PROJ}.absmax", lambda t: t[1:]), "absmax is 63 entries of torch.uint8; .* be 64"),
        (put(f"{PROJ}.nested_absmax", lambda t: t * torch.nan), "NaN"),
        (put(PROJ, lambda t: t[1:]), "codes is 2047 entries"),
        (of_state(shape=[64, 65]), "codes|shape"),
        (of_state(blocksize=48), "block is 48"),
        (of_state(shape=[10**9, 10**9]), "codes|shape"),
        (of_state(quant_type="fp4"), "quant_type"),
        (put(STATE, lambda t: t[1:]), "Cannot load"),
    ],
)
def test_a_damaged_one_is_one_sentence(checkpoints, tmp_path, damage, message):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoints["nf4 double"], folder)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message) as error:
        hf.load(labels=None, seed=0, name=str(folder))
    assert "\n" not in str(error.value)


def test_a_run_on_one_is_estimated_interrupted_restored_and_merged(
    checkpoints, tmp_path, monkeypatch, capsys
):
    cli = CommandLine(tmp_path, monkeypatch, capsys)
    folder = checkpoints["nf4 double"]
    run = ["variant=dora", "model=hf", f"model.name={folder}", "targets=attention"]
    assert cli(*run, "variant.lr=0.02") == 0, cli.err
    assert "is kept in 4 bits (NF4)" in cli.out
    result = cli.result()
    assert result["memory"]["base_bytes"] < 0.5 * sum(
        t.nbytes for t in load_file(f"{checkpoints['dense']}/model.safetensors").values()
    )
    restored = restore(cli.folders()[-1])
    assert restored.base.quantised
    report = export_merged(cli.folders()[-1], tmp_path / "merged")
    assert [step["kl_max_nats"] < 1e-6 for step in report["divergence"]] == [True]
    config = config_of(*run, "train.batch_size=4")
    estimated = Estimator(config, ["a", "b"])._weights_bytes
    assert estimated == pytest.approx(result["memory"]["base_bytes"], rel=0.02)


@pytest.mark.parametrize("requantize", ["nf4", "int8"])
def test_a_merged_model_is_written_as_bitsandbytes_writes_it(tmp_path, checkpoints, requantize):
    """transformers and bitsandbytes read it back, with the logits of our own reading."""
    run = write_adapter(
        tmp_path / "run", *write_task(tmp_path), "model=hf", f"model.name={checkpoints['dense']}"
    )
    out = tmp_path / "out"
    report = export_merged(run, out, requantize=requantize, packed=True)
    assert "saved as bitsandbytes saves them" in " ".join(report["notes"])
    ours = hf.load(labels=["bad", "good"], seed=0, name=str(out))
    assert ours.quantised
    again = theirs(out, AutoModelForSequenceClassification)
    stored = {p: m.store for p, m in ours.model.named_modules() if isinstance(m, StoredLinear)}
    assert len(stored) == 14
    for path, store in stored.items():
        weight = again.get_submodule(path).weight
        codes = weight.data.flatten() if requantize == "nf4" else weight.data
        assert torch.equal(codes, store.codes.data), path
        if requantize == "nf4":
            assert torch.equal(
                bnb.dequantize_4bit(weight.data, weight.quant_state),
                store.dequantize(torch.float32),
            )
    with torch.no_grad():
        tolerance = 2e-2 if requantize == "int8" else 1e-5
        torch.testing.assert_close(
            again(IDS).logits, ours.model(IDS).logits, atol=tolerance, rtol=tolerance
        )
    with pytest.raises(ValueError, match="--packed is set without --requantize"):
        export_merged(run, tmp_path / "other", packed=True)
    assert isinstance(restore(run).layers[next(iter(stored))].store, DenseStore)


def test_experts_beside_quantised_layers_are_read(tmp_path):
    """A checkpoint keeps them one by one, and transformers puts them together while it loads."""
    save_model(tmp_path, "llama3", **SIZES)
    sizes = {**architectures.SIZES, **architectures.EXPERTS, **SIZES, "vocab_size": 321}
    model = architectures.causal("mixtral", **sizes)
    codes = {
        path: Nf4Store(module.weight.detach())
        for path, module in model.named_modules()
        if path.endswith("_proj")
    }
    save(model, tmp_path, codes)
    found = hf.load(labels=None, seed=0, name=str(tmp_path)).model
    assert isinstance(found.model.layers[0].self_attn.q_proj, StoredLinear)
    for name in ("down_proj", "gate_up_proj"):
        stacks = (getattr(m.model.layers[0].mlp.experts, name) for m in (model, found))
        assert torch.equal(*stacks)
