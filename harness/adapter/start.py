"""Training that starts from an adapter: `init_from=<folder>`."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harness.adapter import imported, native, peft_format, tensors
from harness.adapter.folders import adapter_folder
from harness.config import identity
from harness.disk.inputs import model_files
from harness.models.base import BaseModel
from variants import AdapterLinear
from variants.select import is_inside
from variants.state import load_trained_state, trained_state

# What must be alike for a layer's own state to be taken, statistics included.
_SAME = ("variant.adapter", "variant.store", "targets", "layers", "rank_pattern", "alpha_pattern",
         "bias", "train_modules")  # fmt: skip


def fingerprint(folder: Path) -> str:
    """sha256 of the files of an adapter that `start_from` reads."""
    digest = hashlib.sha256()
    for name in (native.ABOUT, native.TENSORS, peft_format.CONFIG, peft_format.TENSORS):
        if (folder / name).is_file():
            digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


class Start:
    """The adapter that a run starts from, if any.

    Args:
        path: folder of a run, of its adapter, or of one that PEFT has saved; None for none.

    Raises ValueError if there is no adapter.
    """

    def __init__(self, path: str | None):
        self.path = None if path is None else adapter_folder(Path(path))

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of its folder, for the record of what was read."""
        return () if self.path is None else model_files(self.path)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Its own, as init_from."""
        return {} if self.path is None else {"init_from": fingerprint(self.path)}

    def give_to(
        self, base: BaseModel, layers: Mapping[str, AdapterLinear], config: Mapping[str, Any]
    ) -> list[str]:
        """`start_from`, if there is an adapter."""
        return [] if self.path is None else start_from(self.path, base, layers, config)


def start_from(
    path: Path, base: BaseModel, layers: Mapping[str, AdapterLinear], config: Mapping[str, Any]
) -> list[str]:
    """Put an adapter's values into freshly adapted layers; sentences that say what was taken.

    A run of the same variant gives all that it had trained, and its layers' statistics. Any other
    adapter, and those of PEFT, give their factors, and what else they trained.

    Args:
        path: folder of a run, of its adapter, or of one that PEFT has saved.
        config: resolved, of the run that starts.

    Raises ValueError, before anything is changed, if the adapter is damaged or does not fit.
    """
    folder = adapter_folder(path)
    own = list((base.model.config.id2label or {}).values()) if base.head else None
    labels = own
    if (folder / native.ABOUT).is_file():
        about = native.read_about(folder)
        if differ := native.differing(base, about["fingerprints"]):
            raise ValueError(f"{differ} {base.name} differ from what {folder} was trained on.")
        alike = all(identity.at(about["config"], key) == identity.at(config, key) for key in _SAME)
        labels = about["labels"]
        if alike and labels == own:
            state = native.read_state(folder, about)
            tensors.check_state(folder / native.TENSORS, state, trained_state(base.model, layers))
            load_trained_state(base.model, layers, state)
            return [f"Starts from {folder}, with all that it had trained."]
    if not (folder / peft_format.CONFIG).is_file():
        raise ValueError(
            f"{folder} is of variant {about['config']['variant']['name']!r} with other settings, "
            "and holds no factors that another could start from."
        )
    own_sites = [layer.site for layer in layers.values() if layer.site is not None]
    adapter = peft_format.read(folder).placed(base.model, own_sites)
    return _take(folder, adapter, base, layers, other_labels=labels != own)


@torch.no_grad()
def _take(
    folder: Path,
    adapter: peft_format.PeftAdapter,
    base: BaseModel,
    layers: Mapping[str, AdapterLinear],
    *,
    other_labels: bool,
) -> list[str]:
    """As `start_from`.

    Args:
        other_labels: the adapter's classifier is for others, be they as many. PEFT does not say.
    """
    if set(adapter.factors) != set(layers):
        differ = sorted(set(adapter.factors) ^ set(layers))
        names = ",".join(sorted({path.rpartition(".")[2] for path in adapter.factors}))
        where = "only there" if differ[0] in adapter.factors else "only here"
        raise ValueError(
            f"{folder} adapts {len(adapter.factors)} layers, this run {len(layers)}: {differ[0]} "
            f"is adapted {where}. Its layers are called [{names}]; set targets to fit."
        )
    symbols = {symbol for factors in adapter.factors.values() for symbol in factors}
    if "m" in symbols and not all("m" in layer.roles() for layer in layers.values()):
        raise ValueError(
            f"{folder} has magnitudes, as DoRA has, and this run's variant has none; variant=dora "
            "or variant=qdora can start from it."
        )
    parameters = dict(base.model.named_parameters())
    notes, others = [], {}
    for name, tensor in adapter.beside(folder, base.model, layers, base.name).items():
        parameter = parameters.get(name)
        if parameter is None or not parameter.requires_grad:
            raise ValueError(
                f"{folder} has trained {name}, which this run does not train; set bias="
                f"{adapter.bias} or train_modules to fit."
            )
        last = other_labels and parameter.shape[:1] == (base.model.config.num_labels,)
        if is_inside(name, base.head) and (last or parameter.shape != tensor.shape):
            notes.append(f"{name} of {folder} is for other labels: a new one is drawn.")
        elif parameter.shape != tensor.shape:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, the model's is "
                f"{tuple(parameter.shape)}."
            )
        else:
            others[name] = tensor
    imported.take_rows(folder, adapter, base)
    before = {
        path: {name: tensor.clone() for name, tensor in layer.adapter_state().items()}
        for path, layer in layers.items()
    }
    try:
        for path, layer in layers.items():
            layer.take(adapter.factors[path], adapter.scales[path])
    except ValueError:
        for path, layer in layers.items():
            layer.load_adapter_state(before[path])
        raise
    for name, tensor in others.items():
        parameters[name].copy_(tensor)
    there, here = (
        sorted({f"{scale:.4g}" for scale in scales})
        for scales in (adapter.scales.values(), (layer.scale for layer in layers.values()))
    )
    rescaled = "" if there == here else ", which the factors make up for"
    notes.append(
        f"Starts from {folder}: s is {' to '.join(there[:: max(1, len(there) - 1)])} there and "
        f"{' to '.join(here[:: max(1, len(here) - 1)])} here{rescaled}."
    )
    return notes
