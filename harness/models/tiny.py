"""Random models, tiny unless sizes are given: no file, no network, a byte-level tokenizer.

For tests, first steps and measurements. They stand for a pretrained base, so their weights are the
same whatever the run's seed, and no bias is 0 and no gain 1. Shapes are odd where the architecture
allows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from harness.models.base import (
    BaseModel,
    Outline,
    assemble,
    auto_class,
    outline_of,
    quiet_loading,
    set_labels,
    storage_dtype,
)
from harness.words import did_you_mean
from variants.streams import draw_rows

BASE_SEED = 0
STD = 0.9  # of weights, over sqrt(hidden size): activations neither vanish nor explode
MAX_TOKENS = 300
_OF_BERT = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
_OF_LLAMA = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
SPECIAL_TOKENS = {"bert": _OF_BERT, "llama": _OF_LLAMA, "mixtral": _OF_LLAMA}


def load(
    *,
    labels: Sequence[str] | None,
    seed: int,
    architecture: str = "bert",
    sizes: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    streamed: bool = False,  # there is no file: no effect
) -> BaseModel:
    """A two-layer `architecture`, bert, llama or mixtral: a classifier of `labels`, or for None a
    language model of bytes.

    Args:
        sizes: fields of transformers' configuration that differ from `tiny_config`.

    Raises ValueError on an unknown architecture or size, and on a bert without labels.
    """
    stored, tokenizer = storage_dtype(dtype), byte_tokenizer(architecture)
    config, name = tiny_config(architecture, len(tokenizer), sizes), model_name(architecture, sizes)
    set_labels(config, labels)
    tokenizer.model_max_length = config.max_position_embeddings
    std = STD / config.hidden_size**0.5
    with quiet_loading(seed):
        model = auto_class(config, labels, name).from_config(config)
    fresh = set()
    for path, parameter in model.named_parameters():
        if not path.startswith(model.base_model_prefix + "."):
            fresh.add(path)
            continue
        rows = parameter.data.view(-1, parameter.shape[-1])
        rows.copy_(draw_rows(*rows.shape, BASE_SEED, name, path, distribution="normal", std=std))
        if parameter.ndim == 1 and path.endswith(".weight"):
            rows += 1.0
        parameter.data = parameter.data.to(stored)  # not model.to: rotary buffers stay float32
    model.config.name_or_path = name
    model.config.dtype = stored
    return assemble(model, tokenizer, name=name, fresh=fresh, seed=seed)


def outline(
    *,
    labels: Sequence[str] | None,
    architecture: str = "bert",
    sizes: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> Outline:
    """The same model without its weights."""
    config = tiny_config(architecture, len(byte_tokenizer(architecture)), sizes)
    name = model_name(architecture, sizes)
    return outline_of(config, labels=labels, name=name, dtype=storage_dtype(dtype))


def model_name(architecture: str, sizes: Mapping[str, Any] | None) -> str:
    return f"random-{architecture}" if sizes else f"tiny-{architecture}"


def tiny_config(
    architecture: str, vocab_size: int, sizes: Mapping[str, Any] | None = None
) -> PreTrainedConfig:
    """BERT: hidden 36, heads 3 x 12. Llama: hidden 36, heads 4 x 10, of which 2 keys and values; as
    in SmolLM2 its output layer is its embedding. Mixtral: a Llama with 4 experts, 2 for each token.

    Raises ValueError on a size that transformers' configuration does not have.
    """
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_TOKENS,
        "pad_token_id": 0,
    }
    kinds = {"bert": BertConfig, "llama": LlamaConfig, "mixtral": MixtralConfig}
    kind = kinds[architecture]
    if architecture == "bert":
        fields |= {"num_attention_heads": 3, "intermediate_size": 53}
    else:
        fields |= {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "intermediate_size": 67,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    if architecture == "mixtral":
        fields |= {"num_local_experts": 4}
    sizes = sizes or {}
    known = kind().to_dict()
    if unknown := [size for size in sizes if size not in known]:
        hint = did_you_mean(unknown[0], known)
        raise ValueError(
            f"model.sizes has {unknown[0]}, which {kind.__name__} does not have.{hint}"
        )
    return kind(**{**fields, **sizes})


def byte_tokenizer(architecture: str) -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8, after three special tokens; [CLS] x [SEP] or <s> x around it."""
    if architecture not in SPECIAL_TOKENS:
        hint = did_you_mean(architecture, SPECIAL_TOKENS)
        raise ValueError(
            f"model.architecture is {architecture}; it must be bert, llama or mixtral.{hint}"
        )
    special = SPECIAL_TOKENS[architecture]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "[CLS] $A [SEP]" if architecture == "bert" else "<s> $A"
    used = [token for token in special.values() if token in template.split()]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        pair=f"{template} $B:1 [SEP]:1" if architecture == "bert" else "<s> $A $B",
        special_tokens=[(token, vocabulary[token]) for token in used],
    )
    types = ["token_type_ids"] if architecture == "bert" else []
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", *types, "attention_mask"],
        **special,
    )
