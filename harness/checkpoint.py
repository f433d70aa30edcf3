"""Checkpoints of a run in progress: safetensors and JSON, written whole or not at all.

    step-<step>/  tensors.safetensors   trained parameters, the layers' statistics, Adam's moments
                  state.json            whose it is, the allocator, the meters, the ranks so far
                  digests.json          sha256 of the two

A checkpoint holds what the next step depends on and nothing else. Data order, dropout and schedule
are functions of the step and need no state. Two are kept, so that one that was damaged costs
some steps and not the run.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from harness.disk import check, check_is_file, read_json
from harness.run import sync, writing
from harness.schemas import Count, Number, Ranks
from variants.layer import AdapterLinear
from variants.state import load_trained_state, trained_state

TENSORS, STATE, DIGESTS = "tensors.safetensors", "state.json", "digests.json"
FORMAT = 3  # what a checkpoint holds; 2 did not say whose it is, nor what computed it


class OtherVersion(ValueError):
    """A checkpoint that another version of this project wrote."""


class _Environment(TypedDict):
    packages: dict[str, str | None]
    platform: str
    commit: NotRequired[str | None]


class _Session(TypedDict):
    after_step: Count
    environment: _Environment
    code: dict[str, str]


class _Meter(TypedDict):
    step_s: list[Number]
    step_tokens: list[Count]
    eval_s: Number
    optimizer_s: Number
    outside_s: Number
    profiled_peak_bytes: Count | None
    peak_shape: Annotated[list[Count], Field(min_length=2, max_length=2)] | None


class _State(TypedDict):
    """state.json; the allocator checks its own part."""

    format: int
    step: Count
    run: dict[str, Any]
    optimizer_values: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], dict[str, Any]]
    sessions: Annotated[list[_Session], Field(min_length=1)]
    rank_history: Annotated[list[Ranks], Field(min_length=1)]
    skipped: list[Count]
    fingerprint_before: str
    meter: _Meter
    hooks: dict[str, Count]
    allocator: dict[str, Any] | None


def save(
    folder: Path,
    step: int,
    *,
    run: Mapping[str, Any],
    model: nn.Module,
    layers: Mapping[str, AdapterLinear],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int | None = 2,
) -> None:
    """Write `folder`/step-<step> and remove all but the last `keep` up to it; None: keep all.

    Args:
        run: whose it is: run key and fingerprints.
        state: JSON values, which `load` returns.

    OSError if the disk does not take it: what was there before is still there.

    Nothing is written if a trained value is not finite: the checkpoint before is the last good one.
    """
    trained = trained_state(model, layers)
    if not all(bool(tensor.isfinite().all()) for tensor in trained.values()):
        return
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.{os.getpid()}"
    tensors = {f"model/{name}": tensor for name, tensor in trained.items()}
    slots: dict[str, dict[str, Any]] = {}
    for index, slot in optimizer.state_dict()["state"].items():
        slots[str(index)] = {}
        for name, value in slot.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value.detach().cpu().contiguous()
            else:
                slots[str(index)][name] = value
    with writing(final, temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / TENSORS)
        content = {"format": FORMAT, "run": run, "step": step, "optimizer_values": slots, **state}
        (temporary / STATE).write_text(json.dumps(content))
        digests = {name: _sha256(temporary / name) for name in (TENSORS, STATE)}
        (temporary / DIGESTS).write_text(json.dumps(digests))
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        sync(folder)
    earlier = [path for path in sorted(folder.glob("step-*")) if path.name <= final.name]
    for old in earlier[: -keep if keep is not None else 0]:
        shutil.rmtree(old)
    for left in folder.glob(".step-*"):  # by a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors and state. ValueError or OSError if they are not what was written."""
    digests = read_json(folder / DIGESTS, dict[str, Any])
    for name in (TENSORS, STATE):
        check_is_file(folder / name)
        if digests.get(name) != _sha256(folder / name):
            raise ValueError(f"the sha256 of {name} is not the one in {DIGESTS}")
    tensors = load_file(folder / TENSORS)
    state = read_json(folder / STATE, dict[str, Any], nonfinite=True)
    if state.get("format") != FORMAT:
        raise OtherVersion(
            f"{folder} was written by another version of this project, which cannot go on from "
            "it; force=true starts the run anew."
        )
    check(_State, state, STATE)
    for name in tensors:
        kind, index, *_ = [*name.split("/"), ""]
        if kind != "model" and not (kind == "optimizer" and index in state["optimizer_values"]):
            raise ValueError(f"{TENSORS} has {name}, which is nobody's")
    return tensors, state


def load(
    folder: Path,
    *,
    run: Mapping[str, Any],
    model: nn.Module,
    layers: Mapping[str, AdapterLinear],
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any] | None:
    """Restore the newest checkpoint of `run` into model and optimiser; its JSON state, or None if
    there is none. A damaged one, and one of another run, is passed over, with a warning, for the
    one before.

    Raises OtherVersion for one of another version of this project, which holds other things.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            tensors, state = _read(path)
        except OtherVersion:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            print(f"Warning: {path} is damaged ({error}); it is not used.", file=sys.stderr)
            continue
        if state["run"] == run:
            break
        print(f"Warning: {path} is of another run; it is not used.", file=sys.stderr)
    else:
        return None
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
