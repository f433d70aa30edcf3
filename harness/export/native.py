"""A run's adapter on disk, in this project's own format: exactly what training needs to go on.

    native.json          which base, which variant, which labels, and the digest of the other file
    native.safetensors   all that was trained, and the layers' statistics

Beside them lies the same adapter in PEFT's format wherever that can hold it (peft_format.py).
A folder is written whole or not at all, and read whole or not at all.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness import assembly, keys
from harness.disk import check, check_is_file, read_json, shortened
from harness.export.folders import NATIVE, adapter_folder
from harness.models.base import BaseModel
from harness.run import sync, writing
from harness.schemas import About
from variants import AdapterLinear, DenseStore, Variant
from variants.state import load_trained_state, trained_state

FORMAT = 1
ABOUT, TENSORS = NATIVE
_NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A trained model, rebuilt from its base and its adapter.

    Args:
        folder: of the adapter.
        base: `base.model` is the adapted model, in evaluation mode.
        layers: its adapted layers by path.
        labels: of the classifier; None of a language model.
        config: the run's; of an adapter made elsewhere, what `assembly` needs of one.
        fingerprints: of data, base and tokenizer, as the run recorded them; empty if it did not.
        notes: sentences that a user should know.
    """

    folder: Path
    base: BaseModel
    variant: Variant
    layers: Mapping[str, AdapterLinear]
    labels: tuple[str, ...] | None
    config: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> nn.Module:
        return self.base.model


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder that then takes the place of `folder`."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    old = temporary.with_name(f"{temporary.name}.old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.iterdir():  # by processes that were killed while they wrote
        if re.fullmatch(rf"\.{re.escape(folder.name)}\.\d+(\.old)?", left.name):
            shutil.rmtree(left, ignore_errors=True)
    with writing(folder, temporary):
        temporary.mkdir()
        write(temporary)
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write(
    folder: Path,
    *,
    model: nn.Module,
    layers: Mapping[str, AdapterLinear],
    about: Mapping[str, Any],
) -> None:
    """Write both files into an existing folder.

    Args:
        about: base, fingerprints, labels and config, as `restore` reads them.
    """
    save_file(trained_state(model, layers), folder / TENSORS)
    sha256 = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
    content = {"format": FORMAT, **about, "tensors_sha256": sha256}
    text = json.dumps({**content, "sha256": keys.digest(content)}, indent=2)
    (folder / ABOUT).write_text(text + "\n", encoding="utf-8")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, all finite. Raises ValueError, naming file and tensor."""
    check_is_file(path)
    try:
        tensors = load_file(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    except Exception as error:  # of as many kinds as a header can be wrong
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged: {reason}.") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in _NUMBERS:
            raise ValueError(f"{path}: {name} is {tensor.dtype}; factors are kept in no such type.")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {name} has values that are not finite.")
    return tensors


def read_about(folder: Path) -> dict[str, Any]:
    """native.json, whole. Raises ValueError if it is damaged or of another version."""
    path = folder / ABOUT
    content = read_json(path, dict[str, Any])
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {shortened(content.get('format'))}; this version reads {FORMAT}."
        )
    signed = {key: value for key, value in content.items() if key != "sha256"}
    if content.get("sha256") != keys.digest(signed):
        raise ValueError(f"{path} is damaged or was edited: its digest does not fit its content.")
    check(About, content, str(path))
    return content


def read_state(folder: Path, about: Mapping[str, Any]) -> dict[str, Tensor]:
    """native.safetensors, whole. Raises ValueError if it is not what native.json describes."""
    path = folder / TENSORS
    tensors = read_tensors(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != about["tensors_sha256"]:
        raise ValueError(f"{path} is damaged: its sha256 is not the one in {ABOUT}.")
    return tensors


def check_state(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming a tensor, unless names, shapes and dtypes are as expected."""
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{path} lacks the tensor {name}.")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(found[name].shape)}, and the model needs "
                f"{tuple(tensor.shape)}."
            )
        if found[name].dtype != tensor.dtype:
            raise ValueError(f"{path}: {name} is {found[name].dtype}, expected {tensor.dtype}.")
    if extra := sorted(set(found) - set(expected)):
        raise ValueError(f"{path} has a tensor {extra[0]}, which the model has not.")


def restore(path: Path, *, dense: bool = False, force: bool = False) -> Restored:
    """The trained model of a run, from its adapter and the base named there; on the CPU.

    Args:
        path: the run's folder, its adapter's, or that of an adapter that PEFT has saved.
        dense: keep the base weights as they were loaded, and not in the variant's store.
        force: take another base than the adapter was trained on, if the shapes allow it.

    Raises ValueError if a file is damaged, the base is not the same one, or they do not fit.
    """
    folder = adapter_folder(path)
    if not (folder / ABOUT).is_file():
        from harness.export import imported

        return imported.restore(folder)
    about = read_about(folder)
    state = read_state(folder, about)
    config = about["config"]
    labels = None if about["labels"] is None else tuple(about["labels"])
    assembly.check_recorded(config, ("model", "variant"), str(folder / ABOUT))
    base = assembly.load_base(config, labels)
    notes = check_base(base, about["fingerprints"], about["base"], force=force)
    variant = assembly.make_variant(config)
    if dense:
        variant = dataclasses.replace(variant, store=DenseStore)
    layers = assembly.adapt(base, variant, config)
    check_state(folder / TENSORS, state, trained_state(base.model, layers))
    load_trained_state(base.model, layers, state)
    base.model.eval()
    return Restored(
        folder=folder,
        base=base,
        variant=variant,
        layers=layers,
        labels=labels,
        config=config,
        fingerprints=about["fingerprints"],
        notes=notes,
    )


def differing(base: BaseModel, fingerprints: Mapping[str, str]) -> str:
    """The parts of a base that are not as recorded: "the base and the tokenizer of", or nothing. An
    adapter of before functions were recorded has none to compare; see `check_base`."""
    found = base.fingerprints
    if "function" not in fingerprints:
        del found["function"]
    differ = [part for part, sha256 in found.items() if sha256 != fingerprints[part]]
    return f"the {' and the '.join(differ)} of" if differ else ""


def check_base(
    base: BaseModel, fingerprints: Mapping[str, str], name: str, *, force: bool
) -> tuple[str, ...]:
    """Notes on a base that differs from the recorded one; ValueError unless `force`d."""
    if not (differ := differing(base, fingerprints)):
        if "function" in fingerprints:
            return ()
        return (
            f"The adapter is of before a base's configuration was recorded: of {name}, its tensors "
            "and its tokenizer alone are checked.",
        )
    what = f"{differ} {base.name} differ from those of {name}"
    if not force:
        raise ValueError(
            f"{what}, which the adapter was trained on; --force takes them all the same."
        )
    return (f"Forced: {what}.",)


def head_and_biases(model: nn.Module, layers: Mapping[str, AdapterLinear]) -> dict[str, Tensor]:
    """The trained tensors besides the adapted layers' factors, by name in the unwrapped model."""
    adapted = {id(p) for layer in layers.values() for p in layer.parameters()}
    state = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapted
    }
    for path, layer in layers.items():
        if "bias" in layer.roles():
            state[f"{path}.bias"] = layer.roles()["bias"].detach()
    return {name: tensor.cpu().to(torch.float32).contiguous() for name, tensor in state.items()}
