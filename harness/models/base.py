"""A base model: what a checkpoint brought, the head it did not, and how both are identified.

A loader (minilm.py, smollm2.py, hf.py, tiny.py) is `load(labels=, seed=, **settings) -> BaseModel`:
a classifier of `labels`, or for None the language model that the checkpoint is. The backbone stays
in its storage dtype; a classifier's head is float32, drawn from (seed, module path, parameter name)
alone, so that every variant of one seed starts from the same one. A language model gets no head:
its output layer belongs to the checkpoint, often as the embedding's own weight, and stays frozen.
"""

import hashlib
import inspect
import json
import math
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.utils import logging as transformers_logging

from harness.disk.digest import digest
from harness.models.fingerprint import definition, tensors_sha256
from harness.models.streamed import Tensors
from harness.words import did_you_mean
from variants.inject import float32_island
from variants.select import is_inside
from variants.streams import draw_rows

STORAGE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_MULTIMODAL = (
    (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
)
_NO_LIMIT = 10**9  # a tokenizer that knows no limit says 10^30


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A pretrained classifier or causal language model on the CPU, before any adapter.

    Args:
        model: in evaluation mode. A classifier's logits are float32 of shape (batch, labels), a
            language model's of shape (batch, tokens, vocabulary) in the storage dtype.
        tokenizer: pads on the right, or on the left for a classifier that reads the last position.
        name: hub id, or the folder as it was given.
        kind: architecture; a "causal" classifier reads its logits at the last token.
        head: paths of the modules trained with every variant, in the model's order: those the
            checkpoint did not fill, or the classifier it brought for the same labels. A language
            model has none.
        sha256: of every parameter and buffer that came from the checkpoint.
        tokenizer_sha256: of the tokenizer without its padding and truncation, which calls set.
        definition: what else defines its function; see `harness.models.fingerprint`.
        max_tokens: the longest input, special tokens included; sys.maxsize if nothing limits it.
        notes: sentences that a reader of the result should know.
        use_cache: as the checkpoint's configuration has it, None if it does not say: training
            needs no cache.
        files: that it was read from, and their folder; see `harness.disk.inputs`.
        quantised: its checkpoint keeps its linear layers in stores, and there is no dense one.
        new_tokens: ids of those that the checkpoint did not have, see `harness.models.new_tokens`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    kind: Literal["encoder", "causal"]
    head: tuple[str, ...]
    sha256: str
    tokenizer_sha256: str
    definition: Mapping[str, Any]
    max_tokens: int
    notes: tuple[str, ...] = ()
    use_cache: bool | None = None
    files: tuple[Path, ...] = ()
    quantised: bool = False
    new_tokens: tuple[int, ...] = ()

    @property
    def fingerprints(self) -> dict[str, str]:
        """The sha256 of its tensors, its tokenizer and what else defines its function."""
        return {
            "base": self.sha256,
            "tokenizer": self.tokenizer_sha256,
            "function": digest(self.definition),
        }


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A base model without weights, on the device `meta`: what its configuration alone says.

    Args:
        head: the modules outside the backbone of a classifier, as if the checkpoint lacked them.
        max_tokens: the model's own limit; sys.maxsize if it has none.
    """

    model: PreTrainedModel
    head: tuple[str, ...]
    max_tokens: int
    new_tokens: tuple[int, ...] = ()


def outline_of(
    config: PreTrainedConfig, *, labels: Sequence[str] | None, name: str, dtype: torch.dtype
) -> Outline:
    """The model of `config`, built of shapes. Raises ValueError as `auto_class` does."""
    auto = auto_class(config, labels, name)
    set_labels(config, labels)
    text = config.get_text_config()
    if text.pad_token_id is None:  # a classifier would refuse a batch
        text.pad_token_id = config.pad_token_id = 0
    with quiet_loading(0), torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    outside = [
        path
        for path, module in model.named_children()
        if path != model.base_model_prefix and any(True for _ in module.parameters())
    ]
    head = tuple(outside if labels is not None else ())
    for path in head:
        float32_island(model.get_submodule(path))
    return Outline(model=model, head=head, max_tokens=max_positions(model))


def storage_dtype(name: str) -> torch.dtype:
    """The dtype called `name`. Raises ValueError on one that weights are not stored in here."""
    if name not in STORAGE_DTYPES:
        hint = did_you_mean(name, STORAGE_DTYPES)
        raise ValueError(f"model.dtype is {name}; it must be {', '.join(STORAGE_DTYPES)}.{hint}")
    return STORAGE_DTYPES[name]


@contextmanager
def quiet_loading(seed: int) -> Iterator[None]:
    """Silence transformers, and keep what it draws out of the global generator.

    What it draws itself (a new head that `assemble` draws again) comes from `seed`.
    """
    verbosity = transformers_logging.get_verbosity()
    progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()


def auto_class(config: PreTrainedConfig, labels: Sequence[str] | None, name: str) -> Any:
    """transformers' class that builds a classifier of `labels`, or for None a language model.

    Raises ValueError if the architecture called `name` has no such form here.
    """
    auto: Any
    if labels is None:
        auto, known = AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING
        lacks = "causal language model; give a model that generates text"
    else:
        auto, known = AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        lacks = "sequence classifier; give an encoder or a causal language model for text"
    if labels is None and getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder ({config.model_type}), which can be trained to classify "
            "but not to write text here; give a causal language model, such as model=smollm2."
        )
    if type(config) not in known:
        if labels is None and of_several_kinds(config):
            lacks = "language model of its text alone; give one that reads nothing but text"
        raise ValueError(
            f"{name} is a {config.model_type} model, for which transformers has no {lacks}."
        )
    if labels is None and architecture_kind(config) == "encoder":
        raise ValueError(
            f"{name} is an encoder, which cannot generate text; give a causal language model, "
            "such as model=smollm2, or choose a task of classification."
        )
    return auto


def of_several_kinds(config: PreTrainedConfig) -> Any:
    """transformers' class that builds a model of texts and images or sounds; None of others."""
    for auto, known in _MULTIMODAL:
        if type(config) in known:
            return auto
    return None


def text_tower(config: PreTrainedConfig, labels: Sequence[str] | None) -> PreTrainedConfig | None:
    """The configuration of the language model within a multimodal one, where transformers knows no
    other language model for it; None elsewhere."""
    text = config.get_text_config()
    if labels is not None or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or text is config:
        return None
    known = type(text) in MODEL_FOR_CAUSAL_LM_MAPPING and of_several_kinds(config) is not None
    return text if known else None


def set_labels(config: PreTrainedConfig, labels: Sequence[str] | None) -> None:
    """Make `config` describe a classifier of `labels`, one per text; None leaves it as it is."""
    if labels is None:
        return
    assert len(set(labels)) == len(labels), f"labels repeat: {labels}"
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "single_label_classification"


def head_candidates(model: PreTrainedModel) -> list[str]:
    """Modules that a checkpoint may lack: the backbone's pooler, and the modules outside the
    backbone. A language model needs its output layer, so its checkpoint may lack nothing."""
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None) is type(model):
        return []
    backbone = model.base_model_prefix
    outside = [name for name, _ in model.named_children() if name != backbone]
    return [f"{backbone}.pooler", *outside]


def assemble(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    fresh: Collection[str],
    seed: int,
    notes: tuple[str, ...] = (),
    files: Iterable[Path] = (),
    quantised: bool = False,
) -> BaseModel:
    """Draw the head, set the padding and identify the rest.

    Args:
        fresh: names of the parameters to draw; all others came from the checkpoint.

    Raises ValueError if the tokenizer does not fit the embedding or has nothing to pad with.
    """
    masks = {key for key, _ in model.named_buffers()}
    digest = weights_sha256(Tensors(model, set(fresh)), masks)
    limit = max_tokens(model, tokenizer)
    defined_by = definition(model, tokenizer, limit)
    backbone = model.base_model_prefix
    outside = {key for key, _ in model.named_parameters() if not is_inside(key, [backbone])}
    brought = outside if outside.isdisjoint(fresh) else set()  # a classifier, trained all the same
    trained = brought.union(fresh)
    head = tuple(
        path for path in head_candidates(model) if any(is_inside(key, [path]) for key in trained)
    )
    draw_head(model, fresh, seed)
    for path in head:
        float32_island(model.get_submodule(path))
    use_cache = getattr(model.config.get_text_config(), "use_cache", None)
    notes += _set_padding(model, tokenizer)
    _check_vocabulary(model, tokenizer, name)
    model.eval()
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        kind=architecture_kind(model.config),
        head=head,
        sha256=digest,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        definition=defined_by,
        max_tokens=limit,
        notes=notes,
        use_cache=use_cache,
        files=tuple(files),
        quantised=quantised,
    )


def is_drawn(name: str, parameter: Tensor) -> bool:
    """True if `draw_head` sets it: matrices and biases, but no gain of a norm."""
    return parameter.ndim > 1 or name.endswith(".bias")


def draw_head(model: PreTrainedModel, fresh: Collection[str], seed: int) -> None:
    """Matrices N(0, initializer_range^2), biases 0; a norm keeps the gain transformers gave it."""
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    for name, parameter in model.named_parameters():
        if name not in fresh or not is_drawn(name, parameter):
            continue
        parameter.data = torch.zeros(parameter.shape)
        if parameter.ndim > 1:
            path, _, role = name.rpartition(".")
            rows = parameter.data.flatten(1)
            rows.copy_(draw_rows(*rows.shape, seed, path, role, distribution="normal", std=std))


def architecture_kind(config: PreTrainedConfig) -> Literal["encoder", "causal"]:
    """Causal if transformers knows the architecture as a causal and not as a masked LM."""
    known = type(config)
    causal = known in MODEL_FOR_CAUSAL_LM_MAPPING and known not in MODEL_FOR_MASKED_LM_MAPPING
    return "causal" if causal else "encoder"


def _set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Padding with the tokenizer's own token, else with its end-of-text token, and a mask of it
    wherever the model takes one."""
    notes: tuple[str, ...] = ()
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                "The tokenizer has neither a padding nor an end-of-text token; "
                'add "pad_token" to its tokenizer_config.json.'
            )
        tokenizer.pad_token = tokenizer.eos_token
        notes += (f"The tokenizer has no padding token; {tokenizer.eos_token} pads.",)
    # On the right absolute positions start at the first token; some read the last position.
    last = any(getattr(module, "summary_type", None) == "last" for module in model.modules())
    tokenizer.padding_side = "left" if last else "right"
    if "attention_mask" not in tokenizer.model_input_names:
        if "attention_mask" in inspect.signature(model.forward).parameters:
            tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
        else:
            notes += (
                f"{type(model).__name__} takes no attention mask: what pads a batch takes part in "
                "its answers.",
            )
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.pad_token_id = tokenizer.pad_token_id
    if architecture_kind(model.config) == "causal":
        model.config.get_text_config().use_cache = False
    return notes


def _check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    vocabulary = tokenizer.get_vocab()
    # Without its files transformers builds a tokenizer of special tokens alone, and says nothing.
    if set(vocabulary) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"{name} has no tokenizer files: all text would become unknown tokens.")
    embedding = model.get_input_embeddings().get_parameter("weight")
    rows = embedding.shape[0]
    largest = max(vocabulary.values())
    if largest >= rows:
        raise ValueError(
            f"The tokenizer of {name} has token ids up to {largest}, but the embedding of the "
            f"model has {rows} rows: they do not belong together."
        )


def max_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The smaller of the model's positions and the tokenizer's own limit."""
    limit = max_positions(model)
    if 0 < tokenizer.model_max_length < _NO_LIMIT:
        limit = min(limit, int(tokenizer.model_max_length))
    return limit


def max_positions(model: PreTrainedModel) -> int:
    """The number of tokens that the model has positions for; sys.maxsize without a limit.

    RoBERTa counts positions from padding_idx + 1, so that many of its rows are never a position.
    """
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")  # MPT's, of its ALiBi biases
    positions = next((found for name in names if (found := getattr(config, name, None))), None)
    if not positions or positions < 0:  # -1 is none
        return sys.maxsize
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings")]
    padded = [getattr(table, "padding_idx", None) for table in tables]
    reserved = max((index + 1 for index in padded if index is not None), default=0)
    return positions - reserved


def weights_sha256(tensors: Mapping[str, Tensor], masks: Collection[str] = ()) -> str:
    """`tensors_sha256` of a base's weights. Raises ValueError if one holds a NaN, or an infinity
    and is none of the `masks`."""

    def finite() -> Iterator[tuple[str, Tensor]]:  # streamed weights are read once
        for name in sorted(tensors):
            tensor = tensors[name].detach()
            if tensor.is_floating_point() and tensor.numel():
                bounds = [float(bound) for bound in tensor.aminmax()]  # NaN if one is in it
                if math.isnan(bounds[0]) or (math.inf in map(abs, bounds) and name not in masks):
                    half = tensor.dtype == torch.float16
                    or_half = ", or float16 cannot hold it: try model.dtype=float32" if half else ""
                    raise ValueError(
                        f"the weight {name} of the base is not finite: the checkpoint is damaged"
                        f"{or_half}."
                    )
            yield name, tensor

    return tensors_sha256(finite())


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of the tokenizer's backend, or of its vocabulary files if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content["padding"] = content["truncation"] = None  # each call sets its own
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(tokenizer.save_vocabulary(folder)):
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward pass and compute the rest again.

    Non-reentrant, so that layers run with frozen parameters and inputs without gradient; a layer
    before the first trainable one is neither kept nor recomputed. Acts in training mode alone.
    Raises ValueError if the architecture does not support it.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # its name in earlier releases of transformers 5
        enable = model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # transformers makes the embeddings require gradients, which only the reentrant kind needs: it
    # would send the backward pass through every frozen layer.
    model.disable_input_require_grads()
