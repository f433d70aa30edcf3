"""Any encoder or causal language model of transformers, from a folder, the cache or the Hub.

Code that a checkpoint brings along is never run (`trust_remote_code` is off).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from harness.models.base import (
    BaseModel,
    assemble,
    auto_class,
    head_candidates,
    is_drawn,
    quiet_loading,
    set_labels,
    storage_dtype,
)


def load(
    *, labels: Sequence[str] | None, seed: int, name: str | None = None, dtype: str = "float32"
) -> BaseModel:
    """The model called `name`: an existing folder or a path (./x, /x, ~/x), else a Hub id.

    Raises ValueError, in one sentence, for whatever cannot be loaded.
    """
    if name is None:
        raise ValueError(
            "model=hf needs model.name=<hub id or local folder>, for example "
            "model.name=distilbert/distilbert-base-uncased."
        )
    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~")) or folder.is_dir():
        check_folder(folder, name)
        return load_checkpoint(folder, name=name, labels=labels, seed=seed, dtype=dtype)
    return load_checkpoint(name, name=name, labels=labels, seed=seed, dtype=dtype)


def check_folder(folder: Path, name: str) -> None:
    """Raise ValueError unless `folder` holds a configuration and weights."""
    if not folder.is_dir():
        raise ValueError(f"model.name is {name}, and there is no such folder.")
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = ": it holds an adapter, so give the model it was trained on" if adapter else ""
        raise ValueError(f"The model folder {name} has no config.json{hint}.")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise ValueError(
            f"The model folder {name} has no weights (model.safetensors or pytorch_model.bin)."
        )


def load_checkpoint(
    source: Path | str, *, name: str, labels: Sequence[str] | None, seed: int, dtype: str
) -> BaseModel:
    """Load `source`, a folder or a Hub id, and give it a head for `labels`, or for None none.

    A classifier that the checkpoint brings is kept if it is for the same labels in the same order,
    and drawn afresh if not; `notes` says which.
    """
    stored = storage_dtype(dtype)
    with quiet_loading(seed):
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # of many kinds, for what is one kind of mistake
            raise _cannot_load(source, name, error) from error
        auto = auto_class(config, labels, name)
        _check_unquantised(config, name)
        own_labels = [label for _, label in sorted(config.id2label.items())]
        set_labels(config, labels)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model, missing, misshapen = _load_weights(auto, source, config, stored)
        except Exception as error:
            raise _cannot_load(source, name, error) from error
        model.config.name_or_path = name

        may_lack = tuple(path + "." for path in head_candidates(model))
        lost = sorted(key for key in missing | misshapen if not key.startswith(may_lack))
        if lost:
            raise ValueError(
                f"The checkpoint {name} is incomplete: {len(lost)} of the "
                f"{len(model.state_dict())} tensors of {type(model).__name__} are missing or have "
                f"another shape, the first being {lost[0]}."
            )

        fresh = missing
        notes: tuple[str, ...] = ()
        backbone = model.base_model_prefix + "."
        classifier = {k: p for k, p in model.named_parameters() if not k.startswith(backbone)}
        if labels is not None and missing.isdisjoint(classifier):  # it is a classifier already
            if own_labels == list(labels):
                notes = (f"The classifier comes from {name}, which has the same labels.",)
                if stored != torch.float32:  # the head is float32: take it unrounded
                    exact, *_ = _load_weights(auto, source, config, torch.float32)
                    for key, parameter in classifier.items():
                        parameter.data = exact.get_parameter(key).data
            else:
                fresh = missing | {k for k, p in classifier.items() if is_drawn(k, p)}
                notes = (f"The classifier of {name} is for other labels: a new one is drawn.",)
    return assemble(model, tokenizer, name=name, fresh=fresh, seed=seed, notes=notes)


def _load_weights(
    auto: Any, source: Path | str, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, set[str], set[str]]:
    """The model, the names its checkpoint lacks and the names that had another shape there."""
    model, found = auto.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return model, set(found["missing_keys"]), {key for key, *_ in found["mismatched_keys"]}


def _check_unquantised(config: PreTrainedConfig, name: str) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{name} is quantised already; give the unquantised model, which a variant's store "
            "can quantise."
        )


def _cannot_load(source: Path | str, name: str, error: Exception) -> ValueError:
    reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    if "trust_remote_code" in str(error):
        reason = "it would have to run code of its own, which is never done here"
    elif isinstance(source, Path):
        pass
    elif is_offline_mode():
        reason = "there is no folder or cached model of that name, and HF_HUB_OFFLINE is set"
    elif isinstance(error, OSError):
        reason = f"there is no folder of that name, and the Hub did not give it ({reason})"
    return ValueError(f"Cannot load the model {name}: {reason}.")
