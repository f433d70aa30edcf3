"""Checkpoints of a run in progress: safetensors and JSON, written whole or not at all.

A checkpoint holds what the next step depends on and nothing else: trained parameters, the layers'
statistics, optimiser state, the allocator. Data order, dropout and schedule are functions of the
step and need no state.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from variants.base import AdapterLinear


def trained_state(model: nn.Module, layers: Mapping[str, AdapterLinear]) -> dict[str, Tensor]:
    """All that training changes: each layer's `adapter_state`, and other trained parameters."""
    state = {
        f"{path}.{name}": tensor
        for path, layer in layers.items()
        for name, tensor in layer.adapter_state().items()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state.setdefault(name, parameter.detach())
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


@torch.no_grad()
def load_trained_state(
    model: nn.Module, layers: Mapping[str, AdapterLinear], state: Mapping[str, Tensor]
) -> None:
    """Take back what `trained_state` gave. Raises ValueError if the names differ."""
    expected = trained_state(model, layers)
    if set(expected) != set(state):
        differ = sorted(set(expected) ^ set(state))
        raise ValueError(f"the saved adapter is of another model or variant: {differ[0]} differs.")
    rest = dict(state)
    for path, layer in layers.items():
        own = {name: rest.pop(f"{path}.{name}") for name in layer.adapter_state()}
        layer.load_adapter_state(own)
    parameters = dict(model.named_parameters())
    for name, tensor in rest.items():
        parameters[name].copy_(tensor)


def save(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    layers: Mapping[str, AdapterLinear],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
) -> None:
    """Write `folder`/step-<step>; keep it and the one before.

    Nothing is written if a trained value is not finite: the checkpoint before is the last good one.
    """
    trained = trained_state(model, layers)
    if not all(bool(tensor.isfinite().all()) for tensor in trained.values()):
        return
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {f"model/{name}": tensor for name, tensor in trained.items()}
    slots: dict[str, dict[str, Any]] = {}
    for index, slot in optimizer.state_dict()["state"].items():
        slots[str(index)] = {}
        for name, value in slot.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value.detach().cpu().contiguous()
            else:
                slots[str(index)][name] = value
    save_file(tensors, temporary / "tensors.safetensors")
    (temporary / "state.json").write_text(
        json.dumps({"step": step, "optimizer_values": slots, **state})
    )
    for path in temporary.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old)


def load(
    folder: Path,
    *,
    model: nn.Module,
    layers: Mapping[str, AdapterLinear],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any] | None:
    """Restore the newest checkpoint into model and optimiser; its JSON state, or None if there is
    none."""
    found = sorted(folder.glob("step-*"))
    if not found:
        return None
    tensors = load_file(found[-1] / "tensors.safetensors")
    state = json.loads((found[-1] / "state.json").read_text())
    load_trained_state(
        model,
        layers,
        {
            name.removeprefix("model/"): t
            for name, t in tensors.items()
            if name.startswith("model/")
        },
    )
    slots: dict[int, dict[str, Any]] = {
        int(index): dict(slot) for index, slot in state.pop("optimizer_values").items()
    }
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            index, _, name = rest.partition("/")
            slots[int(index)][name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    return state


def remove(folder: Path) -> None:
    """Delete the checkpoints of a run that has its result."""
    shutil.rmtree(folder, ignore_errors=True)
