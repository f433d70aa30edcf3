"""Checkpoints of a run in progress: safetensors and JSON, written whole or not at all.

    step-<step>/  tensors.safetensors   trained parameters, the layers' statistics, Adam's moments
                  state.json            whose it is, the allocator, the meters, the ranks so far
                  digests.json          sha256 of the two

A checkpoint holds what the next step depends on and nothing else. Data order, dropout and schedule
are functions of the step and need no state. Two are kept, so that one that was damaged costs
some steps and not the run.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from harness.config.build import UnderTest
from harness.disk.digest import file_sha256
from harness.disk.kinds import Count, Number
from harness.disk.read import check, check_is_file, read_json
from harness.disk.write import new_folder, remove_leftovers
from harness.loop import sessions
from harness.loop.laws import Laws
from harness.loop.meter import Meter
from harness.loop.result import Ranks
from harness.loop.sessions import Session
from harness.loop.step import StepResult
from harness.machine import distributed
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


class _Scaler(TypedDict):
    """torch's, empty where nothing is scaled."""

    scale: NotRequired[Number]
    growth_factor: NotRequired[Number]
    backoff_factor: NotRequired[Number]
    growth_interval: NotRequired[Count]
    _growth_tracker: NotRequired[Count]


class _State(TypedDict):
    """state.json; the allocator checks its own part."""

    format: int
    step: Count
    run: dict[str, Any]
    optimizer_values: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], dict[str, Any]]
    sessions: Annotated[list[_Session], Field(min_length=1)]
    rank_history: Annotated[list[Ranks], Field(min_length=1)]
    skipped: list[Count]
    overflowed: NotRequired[list[Count]]
    scaler: NotRequired[_Scaler]
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
    tensors = {f"model/{name}": tensor for name, tensor in trained.items()}
    slots: dict[str, dict[str, Any]] = {}
    for index, slot in optimizer.state_dict()["state"].items():
        slots[str(index)] = {}
        for name, value in slot.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value.detach().cpu().contiguous()
            else:
                slots[str(index)][name] = value
    content = {"format": FORMAT, "run": run, "step": step, "optimizer_values": slots, **state}
    with new_folder(final) as out:
        save_file(tensors, out / TENSORS)
        (out / STATE).write_text(json.dumps(content))
        digests = {name: file_sha256(out / name) for name in (TENSORS, STATE)}
        (out / DIGESTS).write_text(json.dumps(digests))
    earlier = [path for path in sorted(folder.glob("step-*")) if path.name <= final.name]
    for old in earlier[: -keep if keep is not None else 0]:
        shutil.rmtree(old)
    remove_leftovers(folder, r"step-\d+")


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors and state. ValueError or OSError if they are not what was written."""
    digests = read_json(folder / DIGESTS, dict[str, Any])
    for name in (TENSORS, STATE):
        check_is_file(folder / name)
        if digests.get(name) != file_sha256(folder / name):
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


@dataclass
class RunState:
    """All that the next step depends on and no configuration gives: the one place that knows what
    a checkpoint holds.

    Args:
        folder: of the run's checkpoints.
        run: whose they are: run key and fingerprints.
    """

    folder: Path
    run: Mapping[str, Any]
    test: UnderTest
    meter: Meter
    laws: Laws
    step: int = 0
    rank_history: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    overflowed: list[int] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)

    def save(self, step: int, *, keep: int | None) -> None:
        """Write the checkpoint of `step`; see the function `save`."""
        allocator = self.test.allocator
        state = {
            "sessions": self.sessions,
            "rank_history": self.rank_history,
            "skipped": self.skipped,
            "overflowed": self.overflowed,
            "scaler": self.test.scaler.state_dict(),
            "fingerprint_before": self.laws.fingerprint_before,
            "meter": self.meter.state_dict(),
            "hooks": self.laws.hooks.state_dict(),
            "allocator": allocator and allocator.state_dict(),
        }
        if distributed.is_first():
            save(self.folder, step, **self._parts(), state=state, keep=keep)

    def load(self, environment: Mapping[str, Any], resume: str) -> None:
        """Go on from the newest checkpoint, if there is one, in this session.

        Raises ValueError if that one was computed in another environment, unless to `resume`
        anyway, and if the processes find different ones.
        """
        saved = load(self.folder, **self._parts())
        session = distributed.gather(sessions.now(environment))[0]
        self.sessions = sessions.continued(saved, session, resume, self.folder.parent)
        if saved is None:
            self.note_ranks(0)
        else:
            self.step, self.skipped = saved["step"], saved["skipped"]
            self.overflowed = saved.get("overflowed", [])
            self.test.scaler.load_state_dict(saved.get("scaler", {}))
            self.rank_history = saved["rank_history"]
            self.laws.fingerprint_before = saved["fingerprint_before"]
            self.laws.hooks.load_state_dict(saved["hooks"])
            self.meter.load_state_dict(saved["meter"])
            if self.test.allocator is not None:
                self.test.allocator.load_state_dict(saved["allocator"])
            print(f"continuing {self.folder.parent} after step {self.step}")
        distributed.agree(checkpoint=self.step)

    @property
    def untaken(self) -> list[int]:
        """The steps that the optimiser did not take."""
        return [*self.skipped, *self.overflowed]

    def scaling(self) -> dict[str, float]:
        """The steps that overflowed until now and the scale of the loss, where it is scaled."""
        if not self.test.scaler.is_enabled():
            return {}
        return {
            "overflowed_steps": len(self.overflowed), "loss_scale": self.test.scaler.get_scale(),
        }  # fmt: skip

    def note_overflow(self, step: int, result: StepResult) -> dict[str, float]:
        """Count a step that the optimiser did not take because the scale was too large; its row of
        metrics.jsonl, nothing of any other step."""
        if not result.overflowed:
            return {}
        self.overflowed.append(step)
        return {f"train/{name}": value for name, value in self.scaling().items()}

    def note_ranks(self, step: int) -> None:
        """Add the layers' ranks to the history, if they have changed."""
        ranks = [layer.active_rank() for layer in self.test.layers.values()]
        if not self.rank_history or ranks != self.rank_history[-1]["ranks"]:
            self.rank_history.append({"step": step, "ranks": ranks})

    def _parts(self) -> dict[str, Any]:
        test = self.test
        return {
            "run": self.run,
            "model": test.model,
            "layers": test.layers,
            "optimizer": test.optimizer,
        }
