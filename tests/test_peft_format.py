"""Adapters to PEFT and back: peft itself is the oracle, on disturbed weights."""

import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import variants
from harness.adapter import native, peft_format
from harness.adapter.export import main as export_command
from harness.adapter.folders import adapter_folder
from harness.adapter.restore import restore
from harness.adapter.start import start_from
from harness.config import build
from harness.disk.digest import digest
from harness.disk.write import new_folder
from harness.models import tiny

peft = pytest.importorskip("peft")

CONF = Path(__file__).parent.parent / "conf"
NAMES = sorted(file.stem for file in (CONF / "variant").glob("*.yaml"))
LABELS = ("bad", "good", "fair")
TEXTS = ["a quick test", "of", "several sentences that differ in length"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rank_pattern.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft's own
]


def config_of(*overrides, architecture="bert"):
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        given = ["model=tiny", f"model.architecture={architecture}", "rank=3", "alpha=6"]
        config = compose("config", [*given, *overrides])
    return OmegaConf.to_container(config, resolve=True)


def base_of(architecture="bert", labels=LABELS, seed=0):
    return tiny.load(labels=labels, seed=seed, architecture=architecture)


def adapted(*overrides, architecture="bert", disturbed=True):
    """(config, base, variant, layers), all that is trained moved away from its start."""
    config = config_of(*overrides, architecture=architecture)
    base = base_of(architecture)
    variant = build.make_variant(config)
    layers = build.adapt(base, variant, config)
    if disturbed:
        disturb(base.model)
    return config, base, variant, layers


@torch.no_grad()
def disturb(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def batch_of(base):
    return base.tokenizer(TEXTS, padding=True, return_tensors="pt").data


@torch.no_grad()
def logits_of(model, batch):
    return model.eval()(**batch).logits


def export(folder, config, base, layers, **options):
    peft_format.write(
        folder, model=base.model, layers=layers, base=base.name, config=config, head=base.head,
        **options,
    )  # fmt: skip


def loaded_by_peft(folder, architecture="bert", layers=None):
    """peft's model over a fresh base; one that was quantised if the layers' store was."""
    plain = base_of(architecture, seed=9).model
    for path, layer in (layers or {}).items():
        weight = layer.store.dequantize(torch.float32).clone()
        plain.get_submodule(path).weight = torch.nn.Parameter(weight)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(plain, folder)
    assert not [w for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]
    return model


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("name", NAMES)
def test_peft_computes_the_same(name, architecture, tmp_path):
    if name == "bitfit" and architecture == "llama":
        pytest.skip("there is no bias")
    config, base, _, layers = adapted(f"variant={name}", architecture=architecture)
    batch = batch_of(base)
    try:
        export(tmp_path, config, base, layers)
    except peft_format.NotLowRank as error:
        assert "is not W + s B A" in str(error) and not list(tmp_path.iterdir())
        return
    model = loaded_by_peft(tmp_path, architecture, layers)
    ours = logits_of(base.model, batch)
    torch.testing.assert_close(logits_of(model, batch), ours, rtol=1e-5, atol=1e-5)
    plain = logits_of(base_of(architecture).model, batch)
    assert (ours - plain).abs().max() > 0.01  # there was something to see


@pytest.mark.parametrize("name", ["dora", "adalora_budget"])
def test_peft_loads_the_adapter_of_a_language_model(name, tmp_path):
    config = config_of(f"variant={name}", architecture="llama")
    base = base_of("llama", labels=None)
    layers = build.adapt(base, build.make_variant(config), config)
    disturb(base.model)
    export(tmp_path, config, base, layers)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    model = peft.PeftModel.from_pretrained(base_of("llama", labels=None).model, tmp_path)
    batch = batch_of(base)
    ours = logits_of(base.model, batch)
    torch.testing.assert_close(logits_of(model, batch), ours, rtol=1e-5, atol=1e-5)
    assert (ours - logits_of(base_of("llama", labels=None).model, batch)).abs().max() > 0.01


@pytest.mark.parametrize(
    "overrides",
    [
        ["variant.adapter.scaling=rslora"],
        ["+rank_pattern={key: 5, bert.encoder.layer.1.attention.output.dense: 1}"],
        [
            "+alpha_pattern={query: 1.5, bert.encoder.layer.1.output.dense: 40}",
            "+rank_pattern={value: 2}",
        ],
        ["variant.adapter.scaling=rslora", "+rank_pattern={value: 2}"],
        ["bias=adapted"],
        ["bias=all", "targets=[query,value]"],
        ["variant=dora", "bias=all"],
        ["variant=dora", "+rank_pattern={value: 2}", "+alpha_pattern={key: 1}"],
        ["train_modules=[bert.embeddings.LayerNorm]"],
        ["targets=[bert.encoder.layer.1.output.dense]"],
        ["layers=[1]"],
        ["variant.adapter.init_B=kaiming", "variant.adapter.init_offset=true"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("uniform", [False, True])
def test_every_setting_travels(overrides, uniform, tmp_path):
    config, base, _, layers = adapted(*overrides)
    export(tmp_path, config, base, layers, uniform=uniform)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    if uniform:
        assert not about["rank_pattern"] and not about["alpha_pattern"]
        assert about["lora_alpha"] == about["r"]
    batch = batch_of(base)
    ours, theirs = logits_of(base.model, batch), logits_of(loaded_by_peft(tmp_path), batch)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_plain_settings_are_written_as_they_were_given(tmp_path):
    config, base, _, layers = adapted("targets=[query,value]", "dropout=0.25", "alpha=7")
    export(tmp_path, config, base, layers)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["target_modules"] == ["query", "value"]
    assert (about["r"], about["lora_alpha"], about["lora_dropout"]) == (3, 7, 0.25)
    assert about["modules_to_save"] == ["classifier"]
    assert about["base_model_name_or_path"] == "tiny-bert"
    assert not about["rank_pattern"] and not about["alpha_pattern"] and about["bias"] == "none"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    assert torch.equal(tensors[key], layers["bert.encoder.layer.0.attention.self.query"].A)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("name", ["adalora", "adalora_budget"])
def test_pruned_layers_are_folded(name, uniform, tmp_path):
    config, base, _, layers = adapted(f"variant={name}")
    for number, layer in enumerate(layers.values()):
        k = number % 4 if name == "adalora_budget" else max(1, number % 4)
        if name == "adalora_budget":
            layer.E.data[k:] = 0.0
        else:
            layer.activate(k)
    export(tmp_path, config, base, layers, uniform=uniform)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {
        key.removesuffix(".lora_A.weight"): len(tensor)
        for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
        if key.endswith("lora_A.weight")
    }
    expected = {3} if uniform else {1, 2, 3}
    assert set(ranks.values()) == expected and about["peft_type"] == "LORA"
    assert len(ranks) == sum(layer.used_factors()[1].shape[0] > 0 for layer in layers.values())
    batch = batch_of(base)
    ours, theirs = logits_of(base.model, batch), logits_of(loaded_by_peft(tmp_path), batch)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_nothing_left_is_one_layer_that_does_nothing(tmp_path):
    config, base, _, layers = adapted("variant=adalora_budget")
    for layer in layers.values():
        layer.E.data.zero_()
    export(tmp_path, config, base, layers)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["r"] == 1 and len(about["target_modules"]) == 1
    batch = batch_of(base)
    theirs = logits_of(loaded_by_peft(tmp_path), batch)
    torch.testing.assert_close(theirs, logits_of(base.model, batch), rtol=1e-5, atol=1e-5)


# ---- from peft -----------------------------------------------------------------------------------


def made_by_peft(folder, *, architecture="bert", steps=0, kind=peft.LoraConfig, **settings):
    """A saved adapter of peft's with disturbed weights; the model."""
    given = {"r": 3, "lora_alpha": 7, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    if kind is peft.AdaLoraConfig:
        given |= {"init_r": 5, "target_r": 2, "total_step": 100, "tinit": 0, "tfinal": 10}
        given.pop("r")
    torch.manual_seed(3)
    model = peft.get_peft_model(base_of(architecture, seed=4).model, kind(**given | settings))
    disturb(model)
    model.save_pretrained(folder)
    return model.eval()


FROM_PEFT = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layer.0.attention.self.value": 4, "value": 2,
                                  "layer.1.attention.self.query": 5},
                 "alpha_pattern": {"layer.0.attention.self.value": 3, "value": 1}},
    "dora": {"use_dora": True},
    "adalora": {"kind": peft.AdaLoraConfig},
    "bias": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "one module more": {"modules_to_save": ["classifier", "pooler"]},
}  # fmt: skip


def start(folder, *overrides, **options):
    config, base, variant, layers = adapted(*overrides, disturbed=False, **options)
    notes = start_from(folder, base, layers, config)
    return config, base, variant, layers, notes


@pytest.mark.parametrize("variant", ["lora", "dora", "adalora", "adalora_budget"])
@pytest.mark.parametrize("kind", FROM_PEFT)
def test_adapters_of_peft_are_taken_over(kind, variant, tmp_path):
    model = made_by_peft(tmp_path, **FROM_PEFT[kind])
    overrides = [f"variant={variant}", "targets=[query,value]", "rank=5"]
    overrides += ["bias=adapted"] * (kind == "bias") + ["bias=all"] * (kind == "all biases")
    overrides += ["train_modules=[bert.pooler]"] * (kind == "one module more")
    if kind == "dora" and variant != "dora":
        with pytest.raises(ValueError, match="has magnitudes, as DoRA has, and this run"):
            start(tmp_path, *overrides)
        return
    _, base, _, _layers, notes = start(tmp_path, *overrides)
    batch = batch_of(base)
    ours, theirs = logits_of(base.model, batch), logits_of(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert "Starts from" in notes[-1]
    disturb(base.model, seed=8)  # and it is trainable, all of it
    assert (logits_of(base.model, batch) - theirs).abs().max() > 0.01


@pytest.mark.parametrize("alpha", [7, 0])
def test_pruned_adalora_of_peft_is_taken_over(alpha, tmp_path):
    """An alpha of 0 stands for the rank."""
    model = made_by_peft(tmp_path, kind=peft.AdaLoraConfig, lora_alpha=alpha)
    pattern = {}
    for number, (path, module) in enumerate(model.named_modules()):
        if hasattr(module, "lora_E") and path.endswith(("query", "value")):
            kept = [True] * 5
            kept[number % 5] = kept[0] = False
            module.lora_E["default"].data[~torch.tensor(kept)] = 0.0
            pattern[f"{path.removeprefix('base_model.model.')}.lora_E.default"] = kept
    model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(tmp_path)
    theirs = {  # PEFT divides by the rank and 1e-5, which is below the tolerance of logits
        path.removeprefix("base_model.model."): module.scaling["default"]
        / (float(module.ranknum["default"]) + 1e-5)
        for path, module in model.named_modules() if hasattr(module, "lora_E")
    }  # fmt: skip
    assert peft_format.read(tmp_path).scales == pytest.approx(theirs, rel=1e-8)
    for variant in ("lora", "adalora_budget"):
        _, base, _, layers, _ = start(
            tmp_path, f"variant={variant}", "targets=[query,value]", "rank=5"
        )
        batch = batch_of(base)
        torch.testing.assert_close(
            logits_of(base.model, batch), logits_of(model, batch), rtol=1e-5, atol=1e-5
        )
    assert {layer.active_rank() for layer in layers.values()} <= {3, 4}


@pytest.mark.parametrize("kind", ["plain", "rslora", "dora"])
def test_ten_steps_from_there_are_those_of_peft(kind, tmp_path):
    model = made_by_peft(tmp_path, **FROM_PEFT[kind])
    overrides = ["targets=[query,value]", "rank=3", "alpha=7"]
    overrides += ["variant.adapter.scaling=rslora"] * (kind == "rslora")
    _, base, _, _layers, _ = start(
        tmp_path, f"variant={'dora' if kind == 'dora' else 'lora'}", *overrides
    )
    batch = batch_of(base)
    gold = torch.tensor([0, 1, 2])

    def losses(trained):
        parameters = [p for p in trained.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        trained.eval()  # no dropout of the base
        found = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(trained(**batch).logits, gold)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    ours, theirs = losses(base.model), losses(model)
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert ours[-1] < 0.8 * ours[0]
    torch.testing.assert_close(
        logits_of(base.model, batch), logits_of(model, batch), rtol=1e-3, atol=1e-3
    )


def test_a_head_for_other_labels_is_drawn_anew(tmp_path):
    made_by_peft(tmp_path)
    config = config_of("targets=[query,value]")
    base = base_of(labels=("no", "yes"))
    layers = build.adapt(base, build.make_variant(config), config)
    before = base.model.classifier.weight.clone()
    notes = start_from(tmp_path, base, layers, config)
    assert "for other labels: a new one is drawn" in notes[0]
    assert torch.equal(base.model.classifier.weight, before)


@pytest.mark.parametrize(
    "overrides", [[], ["variant=lora_plus"], ["rank=4", "variant.adapter.init_B=kaiming"]]
)
def test_a_head_for_as_many_other_labels_is_drawn_anew(overrides, tmp_path):
    """Its shape does not say for which: the rows of bad, good and fair are not those of 1, 2, 3."""
    base, layers = write_native(tmp_path / "adapter")
    export(tmp_path / "adapter", config_of(), base, layers)
    config = config_of(*overrides)
    same, other = base_of(), base_of(labels=("1", "2", "3"))
    before = {name: p.clone() for name, p in other.model.named_parameters()}
    for mine, kept in ((same, True), (other, False)):
        mine_layers = build.adapt(mine, build.make_variant(config), config)
        notes = start_from(tmp_path, mine, mine_layers, config)
        assert any("for other labels: a new one is drawn" in note for note in notes) != kept
        found = mine.model.classifier.weight
        assert torch.equal(
            found, base.model.classifier.weight if kept else before["classifier.weight"]
        )
        path = next(iter(layers))
        torch.testing.assert_close(
            mine_layers[path].delta_weight(), layers[path].delta_weight(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"adapts 4 layers, this run 13.*only here. Its layers are called \[query,value\]"),
        (["targets=[query]"], "adapts 4 layers, this run 2"),
        (["targets=[query,value]", "rank=2"], "has room for rank 2; the adapter's is 3"),
        (["targets=[query,value]", "variant=head"], "targets and layers choose nothing"),
        (["targets=[query,value]", "variant=full"], "no factors that could be taken over"),
        (
            ["targets=[query,value]", "variant.adapter.init_offset=true"],
            "has init_offset, so its factors cannot be taken over",
        ),
    ],
)
def test_what_does_not_fit_is_said(overrides, message, tmp_path):
    made_by_peft(tmp_path)
    with pytest.raises(ValueError, match=message):
        start(tmp_path, *overrides)


def test_nothing_is_half_taken(tmp_path):
    made_by_peft(tmp_path)
    overrides = [
        "targets=[query,value]",
        "+rank_pattern={bert.encoder.layer.1.attention.self.value: 2}",
    ]
    config, base, _, layers = adapted(*overrides, disturbed=False)
    before = {name: t.clone() for name, t in base.model.state_dict().items()}
    with pytest.raises(ValueError, match="has room for rank 2; the adapter's is 3"):
        start_from(tmp_path, base, layers, config)
    assert all(torch.equal(before[name], t) for name, t in base.model.state_dict().items())


def test_what_this_run_does_not_train_is_said(tmp_path):
    made_by_peft(tmp_path, bias="all")
    with pytest.raises(ValueError, match=r"has trained .*bias, which this run does not train; set"):
        start(tmp_path, "targets=[query,value]")


# ---- files that are not right --------------------------------------------------------------------


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; it must be 'LORA' or 'ADALORA'"),
        ({"r": "3"}, "r is '3'; it must be a whole number"),
        ({"r": 4}, "has rank 3, and adapter_config.json says 4"),
        ({"r": 0}, "r is 0; it must be greater than or equal to 1"),
        ({"lora_alpha": -1}, "it must be positive"),
        ({"lora_alpha": None}, "lora_alpha is null; it must be a number"),
        ({"init_lora_weights": "pissa"}, "changes the base as well"),
        ({"bias": "some"}, "it must be 'none', 'lora_only' or 'all'"),
        ({"a_new_idea": {"x": 1}}, "a_new_idea is .* which is not supported here"),
        ({"use_dora": True}, "use_dora does not fit the tensors"),
        ({"rank_pattern": [1]}, "rank_pattern is .*; it must be a mapping"),
        ({"rank_pattern": {"(": 1}}, "of rank_pattern is no regular expression"),
        ({"alpha_pattern": {"query": "x"}}, "alpha_pattern.query is 'x'"),
        ({"base_model_name_or_path": 3}, "it must be text"),
    ],
    ids=str,
)
def test_a_config_that_means_something_else_is_refused(changes, message, tmp_path):
    made_by_peft(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        peft_format.read(tmp_path)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{QUERY}.lora_A.weight"), "0.attention.self.query has no lora_A"),
        (lambda t: t.update({f"{QUERY}.lora_A.weight": torch.zeros(3)}), "do not fit together"),
        (lambda t: t.update({f"{QUERY}.lora_E": torch.zeros(3, 1)}), "has a lora_E"),
        (lambda t: t[f"{QUERY}.lora_A.weight"].fill_(torch.nan), "lora_A.weight has values that"),
        (lambda t: t.update({f"{QUERY}.lora_C": torch.zeros(3)}), "of a kind that is not"),
        (lambda t: t.update({"x": torch.zeros(3)}), "the tensor x is of a kind"),
        (lambda t: t.clear(), "holds no low-rank factors"),
        (
            lambda t: t.update({f"{QUERY}.lora_A.weight": torch.zeros(3, 36, dtype=torch.int8)}),
            "not floating-point",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    made_by_peft(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        peft_format.read(tmp_path)


def test_a_pickle_is_not_read(tmp_path):
    made_by_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle, which is never read"):
        peft_format.read(tmp_path)


def write_native(folder, *overrides):
    config, base, _, layers = adapted(*overrides)
    about = {"base": base.name, "labels": list(LABELS), "config": config,
             "fingerprints": {"data": "0", **base.fingerprints}}  # fmt: skip

    with new_folder(folder) as out:
        native.write(out, model=base.model, layers=layers, about=about)
    return base, layers


@pytest.mark.parametrize("name", NAMES)
def test_the_native_format_gives_all_back_to_the_bit(name, tmp_path):
    base, _layers = write_native(tmp_path / "adapter", f"variant={name}")
    restored = restore(tmp_path)
    assert restored.labels == LABELS and not restored.notes
    batch = batch_of(base)
    assert torch.equal(logits_of(restored.model, batch), logits_of(base.model, batch))
    found = restored.base.model.state_dict()
    assert all(torch.equal(found[key], t) for key, t in base.model.state_dict().items())


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("kind", ["plain", "dora", "adalora", "all biases"])
def test_an_adapter_of_peft_is_put_to_use(kind, architecture, tmp_path):
    targets = ["query", "value"] if architecture == "bert" else ["q_proj", "down_proj"]
    settings = FROM_PEFT[kind] | {"target_modules": targets}
    model = made_by_peft(tmp_path, architecture=architecture, **settings)
    edit(tmp_path, base_model_name_or_path=f"tiny-{architecture}")
    restored = restore(tmp_path)
    batch = batch_of(restored.base)
    ours, theirs = logits_of(restored.model, batch), logits_of(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for layer in restored.layers.values():
        layer.merge()
    torch.testing.assert_close(logits_of(restored.model, batch), theirs, rtol=1e-4, atol=1e-5)
    assert restored.labels == ("LABEL_0", "LABEL_1", "LABEL_2") and "no digest" in restored.notes[0]


@pytest.mark.parametrize("options", [[], ["--uniform"]])
@pytest.mark.parametrize("kind", ["patterns", "dora", "adalora", "all biases"])
def test_an_adapter_of_peft_becomes_plain_lora(kind, options, tmp_path, capsys):
    made, out = tmp_path / "made", tmp_path / "out"
    model = made_by_peft(made, **FROM_PEFT[kind])
    edit(made, base_model_name_or_path="tiny-bert")
    export_command([str(made), "--peft", str(out), *options])
    assert "an adapter for PEFT" in capsys.readouterr().out
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    again = loaded_by_peft(out)
    batch = batch_of(base_of())
    torch.testing.assert_close(
        logits_of(again, batch), logits_of(model, batch), rtol=1e-5, atol=1e-5
    )
    for options in ([], ["--force"]):
        with pytest.raises(SystemExit, match="holds an adapter; --replace writes it anew"):
            export_command([str(made), "--peft", str(out), *options])
    export_command([str(made), "--peft", str(out), "--replace"])
    with pytest.raises(SystemExit, match="holds made, which is not of an exported adapter"):
        export_command([str(made), "--peft", str(tmp_path), "--replace"])
    with pytest.raises(SystemExit):
        export_command([str(made), "--merged", str(tmp_path / "m"), "--uniform"])
    assert "--uniform belongs to --peft" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "names no base model"),
        ("tiny-bird", "model.architecture is bird"),
        ("/nowhere", "there is no such folder"),
        ("tiny-llama", "and tiny-llama has no such layer: it was trained on another base"),
    ],
)
def test_a_base_that_does_not_fit_an_adapter_of_peft_is_said(name, message, tmp_path):
    made_by_peft(tmp_path)
    edit(tmp_path, base_model_name_or_path=name)
    with pytest.raises(ValueError, match=message):
        restore(tmp_path)


def test_an_export_does_not_replace_what_training_goes_on_from(tmp_path):
    write_native(tmp_path / "adapter", "variant=lora")
    for out in (tmp_path / "adapter", tmp_path):
        with pytest.raises(SystemExit, match="which is not of an exported adapter"):
            export_command([str(tmp_path), "--peft", str(out), "--replace"])
    assert (tmp_path / "adapter/native.safetensors").is_file()


def test_what_is_not_low_rank_is_said_to_be_merged(tmp_path):
    write_native(tmp_path / "adapter", "variant=full")
    with pytest.raises(SystemExit, match="--merged writes the whole model"):
        export_command([str(tmp_path), "--peft", str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_run_of_the_same_variant_gives_its_statistics_too(tmp_path):
    base, _layers = write_native(tmp_path / "adapter", "variant=adalora_budget")
    _, ours, _, _taken, notes = start(tmp_path, "variant=adalora_budget")
    assert "with all that it had trained" in notes[0]
    found = ours.model.state_dict()
    assert all(torch.equal(found[key], t) for key, t in base.model.state_dict().items())
    with pytest.raises(ValueError, match="holds no factors that another could start from"):
        start(tmp_path, "variant=lora")


def test_another_base_is_refused_unless_forced(tmp_path, monkeypatch):
    _base, _ = write_native(tmp_path / "adapter")
    monkeypatch.setattr(tiny, "STD", 0.2)
    with pytest.raises(ValueError, match=r"the base of tiny-bert differ from those of tiny-bert"):
        restore(tmp_path)
    with pytest.raises(ValueError, match=r"the base of tiny-bert differ from what"):
        start(tmp_path)
    assert "Forced" in restore(tmp_path, force=True).notes[0]


def test_a_config_cannot_call_what_is_not_ours(tmp_path):
    write_native(tmp_path / "adapter")
    path = tmp_path / "adapter/native.json"
    for target in ("os.system", "variants.layer.torch.load", "variants.nothing", 3):
        content = json.loads(path.read_text())
        content["config"]["variant"]["store"]["_target_"] = target
        del content["sha256"]
        content["sha256"] = digest(content)
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"variant\.store asks for"):
            restore(tmp_path)


def mutate(path, generator):
    """Damage a file in one of the ways in which files are damaged."""
    content = bytearray(path.read_bytes())
    at = generator.randrange(len(content))
    match generator.randrange(6):
        case 0:
            path.write_bytes(content[:at])
        case 1:
            content[at] ^= 1 << generator.randrange(8)
            path.write_bytes(content)
        case 2:
            path.write_bytes(content[:at] + bytes(generator.randbytes(9)) + content[at:])
        case 3:
            path.write_bytes(content[:at] + content[at + 7 :])
        case 4:
            head = generator.randrange(min(600, len(content)))
            content[head] = generator.randrange(256)
            path.write_bytes(content)
        case 5:
            path.write_bytes(b"" if at % 3 else content * 2)


def test_every_damage_to_a_native_adapter_is_found(tmp_path):
    write_native(tmp_path / "good", "variant=adalora_budget", "targets=[query]")
    generator, refused = random.Random(1), 0
    good = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir()}
    for number in range(240):
        shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
        name = generator.choice(sorted(good))
        mutate(tmp_path / "bad" / name, generator)
        if (tmp_path / "bad" / name).read_bytes() == good[name]:
            continue
        if name == native.ABOUT and _same_json(tmp_path / "bad" / name, good[name]):
            continue  # white space
        with pytest.raises(ValueError, match="native") as caught:
            about = native.read_about(tmp_path / "bad")
            native.read_state(tmp_path / "bad", about)
        assert "\n" not in str(caught.value), number
        refused += 1
    assert refused > 200


def _same_json(path, good):
    try:
        return json.loads(path.read_bytes()) == json.loads(good)
    except ValueError:
        return False


def test_every_damage_to_an_adapter_of_peft_is_found_or_harmless(tmp_path):
    """A number that was changed into another cannot be seen; anything else is one sentence."""
    made_by_peft(tmp_path / "good", target_modules=["query"], use_dora=True)
    generator, refused = random.Random(2), 0
    names = ["adapter_config.json", "adapter_model.safetensors"]
    for number in range(160):
        shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
        mutate(tmp_path / "bad" / generator.choice(names), generator)
        try:
            adapter = peft_format.read(tmp_path / "bad")
        except ValueError as error:
            assert "adapter_" in str(error) and "\n" not in str(error), number
            refused += 1
        else:
            for path, factors in adapter.factors.items():
                assert path and all(bool(t.isfinite().all()) for t in factors.values())
    assert refused > 80


def test_a_dense_store_is_the_base_as_it_was(tmp_path):
    write_native(tmp_path / "adapter", "variant=qlora")
    layers = restore(tmp_path, dense=True).layers
    plain = base_of().model
    for path, layer in layers.items():
        weight = layer.store.dequantize(torch.float32)
        assert torch.equal(weight, plain.get_submodule(path).weight)
    stores = restore(tmp_path).layers.values()
    assert not any(isinstance(layer.store, variants.DenseStore) for layer in stores)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    write_native(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    with pytest.raises(RuntimeError), new_folder(tmp_path / "adapter") as out:
        (out / "half").write_text("x")
        raise RuntimeError("no space left")
    assert {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

    for left in (".adapter.12", ".adapter.12.old", ".adapter.mine"):  # two of them of a killed one
        (tmp_path / left).mkdir()
    with new_folder(tmp_path / "adapter") as out:
        (out / "new").touch()
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".adapter.mine", "adapter"]


def test_no_adapter_is_said(tmp_path):
    for path, message in (
        (tmp_path / "nowhere", "is no folder"),
        (tmp_path, "holds no adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter_folder(path)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/config.json").touch()
    (tmp_path / "lora-s0/adapter").mkdir(parents=True)
    (tmp_path / "lora-s0/adapter/native.json").touch()
    for path, message in (
        (tmp_path / "merged", "it is a whole model"),
        (tmp_path / "merged/config.json", "is a file; give a run's folder"),
        (tmp_path, "holds runs, of which one is to be given, such as .*lora-s0"),
        (tmp_path / "lora-s1", "Did you mean lora-s0"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter_folder(path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="the run in it is not finished, or failed"):
        adapter_folder(tmp_path)
