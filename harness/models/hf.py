"""Any encoder or causal language model of transformers, from a folder, the cache or the Hub.

Code that a checkpoint brings along is never run (`trust_remote_code` is off).
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from harness.disk.inputs import model_files
from harness.models import quantised
from harness.models.base import (
    BaseModel,
    Outline,
    assemble,
    auto_class,
    head_candidates,
    is_drawn,
    of_several_kinds,
    outline_of,
    quiet_loading,
    set_labels,
    storage_dtype,
    text_tower,
)
from harness.models.streamed import files_of, outlined
from harness.models.streamed import load as load_streamed
from harness.words import did_you_mean
from variants.settings import check_text

# Where transformers is told to look for an adapter. With peft installed it would load one that lies
# next to the model's weights, and silently change the base.
_NO_ADAPTER = "no-adapter"
# Implementations of attention, and the package that one needs.
ATTENTION = {"sdpa": None, "eager": None, "flash_attention_2": "flash_attn"}
_PICKLE = (
    "a pickle, which may run code and is never read here; save it as model.safetensors (in "
    "transformers, load it and call save_pretrained)"
)


def load(
    *,
    labels: Sequence[str] | None,
    seed: int,
    name: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    attention: str | None = None,
    streamed: bool = False,
) -> BaseModel:
    """The model called `name`: an existing folder or a path (./x, /x, ~/x), else a Hub id.

    Args:
        revision: branch, tag or commit of a Hub id; None for its main branch.
        attention: transformers' implementation, a key of `ATTENTION`; None for its own choice.

    With `streamed` its linear layers stay on the disk, see harness.models.streamed; of weights that
    are not in safetensors all is loaded.

    Raises ValueError, in one sentence, for whatever cannot be loaded.
    """
    source = _source(name, revision)
    if isinstance(source, Path):
        check_weights(source, str(name))
    _check_attention(attention, dtype)
    return load_checkpoint(
        source, name=str(name), labels=labels, seed=seed, dtype=dtype, streamed=streamed,
        revision=revision, attention=attention,
    )  # fmt: skip


def outline(
    *,
    labels: Sequence[str] | None,
    name: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    attention: str | None = None,
) -> Outline:
    """The same model without its weights, from config.json alone."""
    source = _source(name, revision)
    _check_attention(attention, dtype)
    return outline_checkpoint(
        source, name=str(name), labels=labels, dtype=dtype, revision=revision, attention=attention
    )


def outline_checkpoint(
    source: Path | str,
    *,
    name: str,
    labels: Sequence[str] | None,
    dtype: str,
    revision: str | None = None,
    attention: str | None = None,
) -> Outline:
    """`load_checkpoint` without weights."""
    stored = storage_dtype(dtype)
    with _of_a_model(source, name, RuntimeError):  # of shapes alone: no lack of memory
        config = _configuration(source, name, revision, attention)
        kind = quantised.store_of(config, name)
        config = text_tower(config, labels) or config
        found = outline_of(config, labels=labels, name=name, dtype=stored)
        if kind is not None:
            outlined(found.model, kind)
        return found


def _check_attention(attention: str | None, dtype: str) -> None:
    """Raise ValueError for an implementation that is none, or cannot be had here."""
    if attention is None:
        return
    if attention not in ATTENTION:
        hint = did_you_mean(str(attention), ATTENTION)
        raise ValueError(
            f"model.attention is {attention}; it must be {', '.join(ATTENTION)} or null.{hint}"
        )
    if (package := ATTENTION[attention]) and find_spec(package) is None:
        raise ValueError(
            f"model.attention is {attention}, whose package {package} is not installed; "
            "model.attention=sdpa needs none."
        )
    if package and dtype == "float32":
        raise ValueError(
            f"model.attention is {attention}, which computes in 16 bits, and model.dtype is "
            "float32; use model.dtype=bfloat16, or model.attention=sdpa."
        )


def _source(name: str | None, revision: str | None = None) -> Path | str:
    """A folder that holds a configuration, or a Hub id. Raises ValueError."""
    if name is None:
        raise ValueError(
            "model=hf needs model.name=<hub id or local folder>, for example "
            "model.name=distilbert/distilbert-base-uncased."
        )
    check_text("model.name", name)
    if revision is not None:
        check_text("model.revision", revision)
    folder = Path(name).expanduser()
    if not (name.startswith((".", "/", "~")) or folder.is_dir()):
        return name
    if not folder.is_dir():
        raise ValueError(f"model.name is {name}, and there is no such folder.")
    if revision is not None:
        raise ValueError(
            f"model.revision is {revision}, but {name} is a folder, which has no revisions; leave "
            "it out."
        )
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = ": it holds an adapter, so give the model it was trained on" if adapter else ""
        raise ValueError(f"The model folder {name} has no config.json{hint}.")
    return folder


def _configuration(
    source: Path | str, name: str, revision: str | None = None, attention: str | None = None
) -> Any:
    kept = {} if attention is None else {"attn_implementation": attention}
    try:
        config = AutoConfig.from_pretrained(
            source, trust_remote_code=False, revision=revision, **kept
        )
    except Exception as error:  # of many kinds, for what is one kind of mistake
        raise _cannot_load(source, name, error) from error
    _check_kernels(config, name)
    if getattr(config, "rescale_every", 0):
        config.rescale_every = 0  # RWKV: or its code would write the weights, by powers of two
    return config


def _check_kernels(config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError if a config asks for kernels by a name of the Hub, which are code."""
    for kind in ("_attn_implementation", "_experts_implementation"):
        wanted = getattr(config, kind, None)
        for kernel in wanted.values() if isinstance(wanted, dict) else [wanted]:
            if isinstance(kernel, str) and "/" in kernel:
                raise ValueError(
                    f"The model {name} asks for the kernel {kernel}, which is code that is never "
                    f"run here; take {kind.removeprefix('_')} out of its config.json."
                )


def check_weights(folder: Path, name: str) -> None:
    """Raise ValueError unless `folder` holds weights in safetensors."""
    if any(folder.glob("*.safetensors")):
        return
    if pickled := sorted(folder.glob("*.bin")):
        raise ValueError(f"The model folder {name} has weights in {pickled[0].name}, {_PICKLE}.")
    raise ValueError(f"The model folder {name} has no weights (model.safetensors).")


def load_checkpoint(
    source: Path | str,
    *,
    name: str,
    labels: Sequence[str] | None,
    seed: int,
    dtype: str,
    streamed: bool = False,
    revision: str | None = None,
    attention: str | None = None,
) -> BaseModel:
    """Load `source`, a folder or a Hub id, and give it a head for `labels`, or for None none.

    A classifier that the checkpoint brings is kept if it is for the same labels in the same order,
    and drawn afresh if not; `notes` says which.
    """
    stored = storage_dtype(dtype)
    with quiet_loading(seed), _of_a_model(source, name):
        config = _configuration(source, name, revision, attention)
        tower = text_tower(config, labels)
        auto = auto_class(tower or config, labels, name)
        kind = quantised.store_of(config, name)
        if tower is not None and kind is not None:
            raise ValueError(
                f"{name} is a quantised {config.model_type} model, whose text tower cannot be had "
                "alone; give the unquantised one."
            )
        own_labels = [label for _, label in sorted(config.id2label.items())]
        set_labels(config, labels)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, trust_remote_code=False, revision=revision
            )
            weights = partial(
                _load_weights, auto, source, config, revision=revision, packed=kind is not None
            )
            if tower is not None:
                weights.keywords["tower"] = tower
            model, missing, misshapen = weights(stored, on_disk=streamed)
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
        notes: tuple[str, ...] = () if kind is None else (quantised.note(name, kind),)
        if tower is not None:
            notes += (
                f"Of {name} ({config.model_type}) the text tower alone is used, a "
                f"{type(model).__name__}.",
            )
        if isinstance(source, Path) and (source / "adapter_config.json").is_file():
            notes += (f"The adapter in {name} is not used: init_from={name} starts from it.",)
        backbone = model.base_model_prefix + "."
        classifier = {k: p for k, p in model.named_parameters() if not k.startswith(backbone)}
        if labels is not None and missing.isdisjoint(classifier):  # it is a classifier already
            if own_labels == list(labels):
                notes += (f"The classifier comes from {name}, which has the same labels.",)
                if stored != torch.float32:  # the head is float32: take it unrounded
                    exact, *_ = weights(torch.float32)
                    for key, parameter in classifier.items():
                        parameter.data = exact.get_parameter(key).data
            else:
                fresh = missing | {k for k, p in classifier.items() if is_drawn(k, p)}
                notes += (f"The classifier of {name} is for other labels: a new one is drawn.",)
        return assemble(
            model, tokenizer, name=name, fresh=fresh, seed=seed, notes=notes,
            files=_files(source, revision), quantised=kind is not None,
        )  # fmt: skip


def _files(source: Path | str, revision: str | None) -> tuple[Path, ...]:
    """The files of a checkpoint; of the Hub's, those in the cache, with the commit's name."""
    if isinstance(source, Path):
        return model_files(source)
    config = cached_file(
        source, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if config is None:
        return ()
    snapshot = Path(config).parent
    return (*model_files(snapshot), *snapshot.parents[1].glob("refs/*"))


def _load_weights(
    auto: Any,
    source: Path | str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    on_disk: bool = False,
    packed: bool = False,
    tower: PreTrainedConfig | None = None,
) -> tuple[PreTrainedModel, set[str], set[str]]:
    """The model, the names its checkpoint lacks and the names that had another shape there.

    Args:
        on_disk: leave its linear layers there.
        packed: read those that bitsandbytes has quantised into stores.
        tower: of the language model in it that is wanted alone.
    """
    if tower is not None:
        auto, on_disk = of_several_kinds(config), False
    files = files_of(source, revision) if on_disk or packed else None
    loaded = None
    if files is not None:
        loaded = load_streamed(auto, source, config, dtype, files, packed, revision)
    if packed and loaded is None:
        raise ValueError(
            "its quantised weights are not in safetensors, or are not those of linear layers"
        )
    model, found = loaded or auto.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        revision=revision,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        adapter_kwargs={"subfolder": _NO_ADAPTER},
    )
    if tower is not None:
        model = _text_alone(model, tower)
    return model, set(found["missing_keys"]), {key for key, *_ in found["mismatched_keys"]}


def _text_alone(whole: PreTrainedModel, tower: PreTrainedConfig) -> PreTrainedModel:
    """The language model in a multimodal model, of the same parameters."""
    with torch.device("meta"):
        text: PreTrainedModel = AutoModelForCausalLM.from_config(tower)
    decoder, output = whole.get_decoder(), whole.get_output_embeddings()
    if type(decoder) is not type(text.base_model) or output is None:
        raise ValueError(
            f"its text tower is a {type(decoder).__name__}, not a {type(text.base_model).__name__}"
        )
    setattr(text, text.base_model_prefix, decoder)
    text.set_output_embeddings(output)
    text.generation_config = whole.generation_config
    return text


_OF_A_WRONG_KIND = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, TypeError,
)  # fmt: skip


@contextlib.contextmanager
def _of_a_model(source: Path | str, name: str, *more: type[Exception]) -> Iterator[None]:
    """An error that a value of a wrong kind in a model's files leads to, far from where it was
    read, is a ValueError that names the model.

    Args:
        more: kinds of errors that can have no other cause in the block.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (*_OF_A_WRONG_KIND, *more)):
            reason: Exception = ValueError(f"{type(error).__name__}: {error}")
        elif isinstance(error, ValueError) and (name not in str(error) or "\n" in str(error)):
            reason = error
        else:
            raise
        raise _cannot_load(source, name, reason) from error


def _cannot_load(source: Path | str, name: str, error: Exception) -> ValueError:
    reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    if "trust_remote_code" in str(error):
        reason = "it would have to run code of its own, which is never done here"
    elif "safetensors" in str(error) and "does not appear to have a file named" in str(error):
        reason = f"its weights are not in safetensors; a .bin is {_PICKLE}"
    elif isinstance(source, Path):
        pass
    elif is_offline_mode():
        reason = "there is no folder or cached model of that name, and HF_HUB_OFFLINE is set"
    elif isinstance(error, OSError):
        reason = f"there is no folder of that name, and the Hub did not give it ({reason})"
    return ValueError(f"Cannot load the model {name}: {reason}.")
