"""Adapters of real architectures to PEFT and back: PEFT's logits are the oracle."""

import json
import warnings

import pytest
import torch
from adapters import config_of
from architectures import EXPERTS, causal, classifier, multimodal
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from harness.adapter import imported, merged, peft_format, peft_places, start
from harness.adapter.folders import PEFT
from harness.config import build as assembly
from harness.models import hf, tiny

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

LABELS = ("bad", "good", "fair")
MIXTURE = {**EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 2}
MIXTURES = {
    "deepseek_v3": {**MIXTURE, "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4,
                    "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1, "topk_group": 1},
    "glm4_moe": {**MIXTURE, "head_dim": 8, "n_group": 1, "topk_group": 1},
    "qwen3_next": {**EXPERTS, "num_key_value_heads": 2, "head_dim": 8,
                   "shared_expert_intermediate_size": 8, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8,
                   "layer_types": ["linear_attention", "full_attention"]},
    "mixtral": {**EXPERTS, "num_key_value_heads": 2},
}  # fmt: skip
TEXTS = ["a quick test", "several sentences that differ in length"]


def saved(folder, model):
    """The model, disturbed, on the disk beside a tokenizer of bytes."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer = tiny.byte_tokenizer("llama")
    tokenizer.add_eos_token = True
    tokenizer.save_pretrained(folder)
    return folder


def sizes(**more):
    return {"vocab_size": 264, "max_position_embeddings": 300, "pad_token_id": 0, **more}


def ours(folder, labels, *overrides):
    """(config, base, layers) of a run on the model in `folder`, all that is trained moved."""
    config = config_of("model=hf", f"model.name={folder}", "model.dtype=float32", "rank=3",
                       "alpha=6", *overrides)  # fmt: skip
    base = assembly.load_base(config, labels)
    layers = assembly.adapt(base, assembly.make_variant(config), config)
    disturb(base.model)
    return config, base, layers


@torch.no_grad()
def disturb(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def batch():
    return {"input_ids": torch.tensor([[1, 70, 80, 91, 2], [1, 99, 120, 84, 2]])}


@torch.no_grad()
def logits_of(model, dtype=torch.float64):
    """In float64 no processor's order of adding matters."""
    model.config._experts_implementation = "eager"  # grouped products have no float64
    return model.eval().to(dtype)(**batch()).logits


def export(folder, config, base, layers, **options):
    folder.mkdir()
    peft_format.write(folder, model=base.model, layers=layers, base=base.name, config=config,
                      head=base.head, **options)  # fmt: skip
    return folder


def by_peft(folder, base, labels=None):
    """PEFT's model of the adapter; no weight may be missing or left."""
    if labels is None:
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=len(labels), dtype=torch.float32
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(plain, folder)
    texts = [str(w.message) for w in caught]
    assert not [text for text in texts if "missing" in text or "unexpected" in text]
    return model


def assert_alike(found, expected, plain):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 0.01  # there was something to see


# ---- mixtures whose experts PEFT renames ---------------------------------------------------------


def without_experts(kind):
    """All but the experts, but of Mixtral, whose dense layers are not called as experts were."""
    block = "" if kind == "qwen3_next" else "'*mlp.down_proj',"
    dense = f"[attention,gate_proj,up_proj,{block}'*shared_expert*.down_proj']"
    return [] if kind == "mixtral" else [f"targets={dense}", "partial=true"]


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("uneven", [False, True])
def test_peft_computes_the_lora_of_a_mixture(kind, uneven, tmp_path):
    base_folder = saved(tmp_path / "base", causal(kind, **sizes(**MIXTURES[kind])))
    pattern = ["+rank_pattern={o_proj: 1}"] if uneven else []
    config, base, layers = ours(base_folder, None, *pattern, *without_experts(kind))
    folder = export(tmp_path / "adapter", config, base, layers)
    expected = logits_of(base.model)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32))
    assert_alike(logits_of(by_peft(folder, base_folder)), expected, plain)
    assert_alike(logits_of(imported.restore(folder).model), expected, plain)
    about = json.loads((folder / PEFT[0]).read_text())
    assert about["peft_type"] == ("LORA" if kind == "mixtral" else "ADALORA")


def test_experts_next_to_layers_that_are_called_so_are_refused(tmp_path):
    base_folder = saved(
        tmp_path / "base", causal("deepseek_v3", **sizes(**MIXTURES["deepseek_v3"]))
    )
    config, base, layers = ours(base_folder, None)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    with pytest.raises(peft_format.NotLowRank, match=f"has no form for it next to {name}"):
        export(tmp_path / "adapter", config, base, layers)


def test_a_mixture_with_magnitudes_is_refused(tmp_path):
    kind = "deepseek_v3"
    base_folder = saved(tmp_path / "base", causal(kind, **sizes(**MIXTURES[kind])))
    config, base, layers = ours(base_folder, None, "variant=dora", *without_experts(kind))
    with pytest.raises(
        peft_format.NotLowRank, match=r"model.layers.0.mlp.gate_proj has a magnitude"
    ):
        export(tmp_path / "adapter", config, base, layers)
    assert not list((tmp_path / "adapter").iterdir())
    config, base, layers = ours(base_folder, None, "variant=dora", "targets=[o_proj]")
    folder = export(tmp_path / "other", config, base, layers)
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    models = (by_peft(folder, base_folder), base.model, plain)
    assert_alike(*(logits_of(model, torch.float32) for model in models))  # as DoRA adds


def test_the_names_of_experts_are_those_of_peft():
    from peft.utils import transformers_weight_conversion as theirs

    assert {k: set(v) for k, v in peft_places.EXPERTS.items()} == {
        kind: set(names) for kind, names in theirs._MOE_TARGET_MODULE_MAPPING.items()
    }
    assert set(theirs._MOE_FUSED_TARGETS) == set(peft_places.EXPERTS)
    assert peft_places._CONVERSIONS == theirs._MODEL_TO_CONVERSION_PATTERN


def test_peft_computes_the_lora_of_a_multimodal_model(tmp_path):
    base_folder = saved(tmp_path / "base", multimodal(264))
    config, base, layers = ours(base_folder, None)
    folder = export(tmp_path / "adapter", config, base, layers)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32))
    assert_alike(logits_of(by_peft(folder, base_folder)), logits_of(base.model), plain)
    assert_alike(logits_of(imported.restore(folder).model), logits_of(base.model), plain)


def ours_untrained(folder, labels):
    return assembly.load_base(config_of("model=hf", f"model.name={folder}"), labels).model


# ---- tied weights, output layers -----------------------------------------------------------------


def llama(folder, *, tied):
    return saved(folder, causal("llama", **sizes(tie_word_embeddings=tied, num_key_value_heads=2)))


def theirs(base, folder, labels=None, **settings):
    """PEFT's own adapter, disturbed and saved; its logits."""
    if labels is None:
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=labels, dtype=torch.float32, ignore_mismatched_sizes=True
        )
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(plain, peft.LoraConfig(**settings))
        disturb(model, seed=6)
        model.save_pretrained(folder)
    return logits_of(model)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_tied_weights_that_are_trained_stay_tied(module, tmp_path):
    base_folder = llama(tmp_path / "base", tied=True)
    config, base, layers = ours(base_folder, None, f"train_modules=[{module}]")
    expected = logits_of(base.model)
    folder = export(tmp_path / "adapter", config, base, layers)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32))
    assert_alike(logits_of(by_peft(folder, base_folder)), expected, plain)
    assert_alike(logits_of(imported.restore(folder).model), expected, plain)
    config, base, layers = ours(base_folder, None, f"train_modules=[{module}]")
    start.start_from(folder, base, layers, config)
    assert_alike(logits_of(base.model), expected, plain)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"]])
def test_tied_weights_that_peft_has_trained(modules, tmp_path):
    base_folder = llama(tmp_path / "base", tied=True)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32))
    settings = {"modules_to_save": modules, "task_type": "CAUSAL_LM"}
    options = ("targets=[q_proj,v_proj]", "train_modules=[embed_tokens]")
    expected = theirs(base_folder, tmp_path / "tied", **settings, ensure_weight_tying=True)
    assert_alike(logits_of(imported.restore(tmp_path / "tied").model), expected, plain)
    config, base, layers = ours(base_folder, None, *options)
    start.start_from(tmp_path / "tied", base, layers, config)
    assert_alike(logits_of(base.model), expected, plain)

    theirs(base_folder, tmp_path / "apart", **settings)
    apart = r"has trained .*weight apart from .*weight, which .* ties to it; train it with ensure_w"
    with pytest.raises(ValueError, match=apart):
        imported.restore(tmp_path / "apart")
    config, base, layers = ours(base_folder, None, *options)
    with pytest.raises(ValueError, match=apart):
        start.start_from(tmp_path / "apart", base, layers, config)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_an_adapted_output_layer_carries_the_weight_of_the_base(tmp_path, task_type):
    base_folder = llama(tmp_path / "base", tied=False)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32))
    targets = ["q_proj", "lm_head"]
    expected = theirs(base_folder, tmp_path / "adapter", target_modules=targets,
                      task_type=task_type)  # fmt: skip
    tensors = load_file(tmp_path / "adapter" / PEFT[1])
    assert "base_model.model.lm_head.base_layer.weight" in tensors
    restored = imported.restore(tmp_path / "adapter")
    assert_alike(logits_of(restored.model), expected, plain)
    for variant in ("lora", "qlora"):
        config, base, layers = ours(base_folder, None, "targets=[q_proj,lm_head]",
                                    f"variant={variant}")  # fmt: skip
        start.start_from(tmp_path / "adapter", base, layers, config)
        if variant == "lora":
            assert_alike(logits_of(base.model), expected, plain)
    other = llama(tmp_path / "other", tied=False)
    changed = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    changed.lm_head.weight.data += 1.0
    changed.save_pretrained(other)
    about = json.loads((tmp_path / "adapter" / PEFT[0]).read_text())
    about["base_model_name_or_path"] = str(other)
    (tmp_path / "adapter" / PEFT[0]).write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"adapts lm_head over another weight than .* has there"):
        imported.restore(tmp_path / "adapter")


# ---- classifiers ---------------------------------------------------------------------------------


HEADS = {
    "bart": ("classification_head", ["q_proj", "v_proj"]),
    "t5": ("classification_head", ["q", "v"]),
    "xlnet": ("logits_proj", ["layer_1", "layer_2"]),
    "llama": ("score", ["q_proj", "v_proj"]),
    "distilbert": ("classifier", ["q_lin", "v_lin"]),
}
CLASSIFIERS = {
    "bart": lambda: classifier(
        "bart", d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, **sizes(),
    ),
    "t5": lambda: classifier("t5", d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                             decoder_start_token_id=0, **sizes()),
    "xlnet": lambda: classifier("xlnet", d_model=16, n_layer=2, n_head=2, d_inner=24,
                                **sizes(max_position_embeddings=None)),
    "llama": lambda: classifier("llama", **sizes(num_key_value_heads=2)),
    "distilbert": lambda: classifier("distilbert", dim=16, n_heads=2, hidden_dim=24, **sizes()),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_of_peft_is_a_classifier(kind, tmp_path):
    base_folder = saved(tmp_path / "base", CLASSIFIERS[kind]())
    head, targets = HEADS[kind]
    settings = {"target_modules": targets, "task_type": "SEQ_CLS", "modules_to_save": [head]}
    expected = theirs(base_folder, tmp_path / "adapter", 3, **settings)
    restored = imported.restore(tmp_path / "adapter")
    assert restored.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    torch.testing.assert_close(logits_of(restored.model), expected, rtol=1e-4, atol=1e-5)
    path = tmp_path / "adapter" / PEFT[0]
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "task_type": None}))
    assert imported.restore(tmp_path / "adapter").labels == restored.labels


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_peft_computes_our_classifier(kind, tmp_path):
    base_folder = saved(tmp_path / "base", CLASSIFIERS[kind]())
    config, base, layers = ours(base_folder, LABELS)
    folder = export(tmp_path / "adapter", config, base, layers)
    model = by_peft(folder, base_folder, LABELS)
    torch.testing.assert_close(logits_of(model), logits_of(base.model), rtol=1e-4, atol=1e-5)
    restored = imported.restore(folder)
    torch.testing.assert_close(
        logits_of(restored.model), logits_of(base.model), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # without biases; with some
def test_biases_of_the_low_rank_product(kind, tmp_path):
    base_folder = saved(tmp_path / "base", causal(kind, **sizes(num_key_value_heads=2)))
    targets = ["q_proj", "o_proj"]
    settings = {"target_modules": targets, "task_type": "CAUSAL_LM", "lora_bias": True}
    expected = theirs(base_folder, tmp_path / "adapter", **settings)
    plain = logits_of(ours_untrained(base_folder, None))
    restored = imported.restore(tmp_path / "adapter")
    again = tmp_path / "again"
    again.mkdir()
    peft_format.write(again, model=restored.model, layers=restored.layers,
                      base=restored.base.name, config=restored.config)  # fmt: skip
    for model in (restored.model, by_peft(again, base_folder), imported.restore(again).model):
        assert_alike(logits_of(model), expected, plain)
    with pytest.raises(ValueError, match=r"layers.0.\S+_proj has a bias .* none in the base"):
        merged.merge_into_base(restored.model.float(), torch.float32)
    config, base, layers = ours(base_folder, None, "targets=[q_proj,o_proj]")
    with pytest.raises(ValueError, match=r"bias of .* none of|does not train; set bias=adapted"):
        start.start_from(tmp_path / "adapter", base, layers, config)


def test_a_run_starts_from_biases_of_the_low_rank_product(tmp_path):
    base_folder = saved(tmp_path / "base", causal("qwen2", **sizes(num_key_value_heads=2)))
    expected = theirs(base_folder, tmp_path / "adapter", task_type="CAUSAL_LM", lora_bias=True)
    config, *_ = ours(base_folder, None, "targets=[q_proj,v_proj]", "bias=adapted")
    base = assembly.load_base(config, None)
    plain = logits_of(ours_untrained(base_folder, None))
    layers = assembly.adapt(base, assembly.make_variant(config), config)
    start.start_from(tmp_path / "adapter", base, layers, config)
    assert_alike(logits_of(base.model), expected, plain)


def test_adapters_of_other_tasks_are_refused(tmp_path):
    base_folder = saved(tmp_path / "base", CLASSIFIERS["llama"]())
    settings = {"modules_to_save": ["score"]}
    theirs(base_folder, tmp_path / "regression", 1, task_type="SEQ_CLS", **settings)
    with pytest.raises(ValueError, match="classifier of one label, which is a regression"):
        imported.restore(tmp_path / "regression")
    theirs(base_folder, tmp_path / "tokens", 3, task_type="TOKEN_CLS", **settings)
    with pytest.raises(ValueError, match="task_type is 'TOKEN_CLS'; adapters of sequence class"):
        imported.restore(tmp_path / "tokens")
    path = tmp_path / "tokens" / PEFT[0]  # as PEFT writes it where no task is given
    mapping = {"base_model_class": "LlamaForTokenClassification"}
    about = {**json.loads(path.read_text()), "task_type": None, "auto_mapping": mapping}
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="task_type is 'TOKEN_CLS'; adapters of sequence class"):
        imported.restore(tmp_path / "tokens")
    for kind, word in (("ForQuestionAnswering", "QUESTION_ANS"), ("Model", "FEATURE_EXTRACTION")):
        about["auto_mapping"] = {"base_model_class": f"Llama{kind}"}
        path.write_text(json.dumps(about))
        with pytest.raises(ValueError, match=f"task_type is '{word}'; adapters of"):
            imported.restore(tmp_path / "tokens")
    xlnet = saved(tmp_path / "xlnet", CLASSIFIERS["xlnet"]())
    theirs(xlnet, tmp_path / "headless", 3, task_type="SEQ_CLS", target_modules=["layer_1"])
    with pytest.raises(ValueError, match=r"does not hold logits_proj.weight; save it with modules"):
        imported.restore(tmp_path / "headless")


def test_magnitudes_without_a_variant_that_has_them(tmp_path):
    base_folder = llama(tmp_path / "base", tied=False)
    theirs(base_folder, tmp_path / "adapter", use_dora=True, task_type="CAUSAL_LM")
    config, base, layers = ours(base_folder, None, "targets=[q_proj,v_proj]")
    with pytest.raises(ValueError, match=r"has magnitudes, .* variant=dora or variant=qdora can"):
        start.start_from(tmp_path / "adapter", base, layers, config)


# ---- weights that are kept transposed ------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "dora", "adalora"])
@pytest.mark.parametrize("labels", [None, LABELS], ids=["causal", "classifier"])
@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt"])
def test_peft_computes_the_adapters_of_gpt2(kind, labels, variant, tmp_path):
    """And back, with all of their matrices adapted; a merged folder is transformers' own."""
    build = causal if labels is None else classifier
    base_folder = saved(tmp_path / "base", build(kind, **sizes()))
    config, base, layers = ours(base_folder, labels, f"variant={variant}", "partial=false")
    assert {path.rpartition(".")[2] for path in layers} == {"c_attn", "c_proj", "c_fc"}
    assert all(path.rpartition(".")[2] != "c_fc" or layer.out_features == 4 * layer.in_features
               for path, layer in layers.items())  # fmt: skip
    expected = logits_of(base.model)
    folder = export(tmp_path / "adapter", config, base, layers)
    assert json.loads((folder / PEFT[0]).read_text())["fan_in_fan_out"] is True
    plain = logits_of(ours_untrained(base_folder, labels))
    assert_alike(logits_of(by_peft(folder, base_folder, labels)), expected, plain)
    restored = imported.restore(folder).model  # whose norms of rows are those of float32 weights
    assert_alike(logits_of(restored, torch.float32).double(), expected, plain)
    merged.merge_into_base(base.model.float(), torch.float32).save_pretrained(tmp_path / "merged")
    kind_of_model = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    loaded, told = kind_of_model.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values())
    assert_alike(logits_of(loaded), expected, plain)


def test_an_adapter_of_gpt2_is_started_from(tmp_path):
    base_folder = saved(tmp_path / "base", causal("gpt2", **sizes()))
    config, base, layers = ours(base_folder, None)
    folder = export(tmp_path / "adapter", config, base, layers)
    expected = logits_of(base.model)
    fresh = assembly.load_base(config, None)
    others = assembly.adapt(fresh, assembly.make_variant(config), config)
    start.start_from(folder, fresh, others, config)
    assert_alike(logits_of(fresh.model), expected, logits_of(ours_untrained(base_folder, None)))


# ---- an adapter beside a model -------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_an_adapter_beside_a_model_is_not_put_into_it(streamed, tmp_path):
    folder = llama(tmp_path / "base", tied=False)
    alone = hf.load(labels=None, seed=0, name=str(folder), streamed=streamed)
    theirs(folder, folder, task_type="CAUSAL_LM")
    assert (folder / PEFT[0]).is_file()
    attached = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(logits_of(attached), logits_of(alone.model))  # what transformers does
    beside = hf.load(labels=None, seed=0, name=str(folder), streamed=streamed)
    assert beside.sha256 == alone.sha256
    assert torch.equal(logits_of(beside.model), logits_of(alone.model))
    assert beside.notes[-1].endswith("is not used: init_from=" + str(folder) + " starts from it.")
