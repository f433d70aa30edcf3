"""The function that a base model computes, as plain values: all that its tensors do not say.

Two models with the same tensors differ if their activation, their number of heads or the tokens
that end an answer differ. `definition` says so: the class, the resolved configuration, the
generation settings, and how text becomes tokens. Its digest is the fingerprint `function` of a run;
the values are kept in the result, so that a refusal can name the key.

Left out are names and paths, what this project sets for every model (dtype, labels, padding), what
changes no number, and the version of transformers: a run's environment has that. An option that is
off (null or false) counts as absent, since a newer release of transformers adds options that are
off, and a study may be continued with it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LEFT_OUT = {
    # names, paths, versions
    "_name_or_path", "name_or_path", "_commit_hash", "architectures", "auto_map", "finetuning_task",
    "transformers_version", "task_specific_params",
    # what is set here: by model.dtype, from the task's labels
    "dtype", "torch_dtype", "id2label", "label2id", "num_labels", "problem_type",
    # what changes no number
    "use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict", "return_dict_in_generate", "gradient_checkpointing", "_from_model_config",
}  # fmt: skip
_OF_TOKENIZER = (
    "truncation_side", "model_input_names", "clean_up_tokenization_spaces", "split_special_tokens",
    "add_bos_token", "add_eos_token", "chat_template",
)  # fmt: skip


def definition(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", max_tokens: int
) -> dict[str, Any]:
    """All that defines the model's function besides its tensors, as JSON values. Call it before the
    padding is set: some models count positions from the padding token of their configuration."""
    kind, generation = type(model), getattr(model, "generation_config", None)
    found = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "config": model.config.to_dict(),
        "generation": {} if generation is None else generation.to_dict(),
        "tokenizer": tokenizer_settings(tokenizer),
        "max_tokens": max_tokens,
    }
    plain: dict[str, Any] = _kept(json.loads(json.dumps(found, default=str)))
    return plain


def tokenizer_settings(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """The settings by which a tokenizer works, besides its vocabulary and its backend, which
    `tokenizer_sha256` covers. Padding is left out: each call sets its own."""
    settings = {name: getattr(tokenizer, name, None) for name in _OF_TOKENIZER}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    settings["special_tokens"] = special
    if getattr(tokenizer, "backend_tokenizer", None) is None:  # the rest is code, and its arguments
        kind = type(tokenizer)
        settings["class"] = f"{kind.__module__}.{kind.__qualname__}"
        settings["added_tokens"] = tokenizer.get_added_vocab()
    return _kept(settings)


def tensors_sha256(tensors: Iterable[tuple[str, "Tensor"]]) -> str:
    """sha256 over name, dtype, shape and bytes of each tensor, in the order given."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differences(ours: Any, theirs: Any, prefix: str = "") -> list[str]:
    """A phrase for each key of two nested mappings that differs: "config.hidden_act is 'relu', was
    'gelu'"; `theirs` is the earlier one."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return [
            phrase
            for key in sorted({*ours, *theirs})
            for phrase in differences(ours.get(key), theirs.get(key), f"{prefix}.{key}".lstrip("."))
        ]
    return [] if ours == theirs else [f"{prefix} is {_short(ours)}, was {_short(theirs)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kept(node: Any) -> Any:
    """Drops the keys that are left out, and the options that are off."""
    if isinstance(node, Mapping):
        kept = {str(key): _kept(value) for key, value in node.items() if key not in _LEFT_OUT}
        return {
            key: value for key, value in kept.items() if value is not None and value is not False
        }
    return [_kept(value) for value in node] if isinstance(node, list | tuple) else node
