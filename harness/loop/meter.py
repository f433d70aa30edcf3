"""The cost of training: time and memory of the training phase alone, and norms of the factors.

Time leaves out warm-up steps and evaluation. Peak memory on a GPU is the allocator's. On a CPU it
is the bytes of tensors held between steps plus the profiler's exact peak inside one step: that is
the figure to compare between variants; the resident set next to it includes the allocator's habits.
"""

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.config.build import UnderTest
from harness.loop.step import StepResult
from harness.machine import distributed
from variants.layer import AdapterLinear, LowRankLinear

WARMUP_STEPS = 3  # of a process, not timed: first touches of memory, lazy initialisation
PROFILED_STEP = 2  # the first with optimiser state in place


def tensor_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of the parameters, buffers and optimiser state that this process holds."""
    tensors = [*model.parameters(), *model.buffers()]
    for slot in optimizer.state.values() if optimizer else ():
        tensors += [value for value in slot.values() if isinstance(value, torch.Tensor)]
    own = [distributed.held(tensor) for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


def peak_tensor_bytes(body: Callable[[], object]) -> int:
    """The exact peak of bytes allocated on the CPU while `body` runs, over those at its start."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce itself
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        body()
    held = peak = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _resident_bytes(field: str) -> int | None:
    """VmRSS or VmHWM of this process, in bytes; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def _reset_resident_peak() -> bool:
    """Make VmHWM start again from VmRSS; whether this machine lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


class Meter:
    """Times and memory of one run's training phase.

    Wrap each step in `step` and all else that happens between steps in `pause`. A step is not
    waited for: on a GPU its optimiser's kernels may run, and count, in the next one.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device):
        self.model, self.optimizer, self.device = model, optimizer, device
        self.step_s: list[float] = []
        self.step_tokens: list[int] = []
        self.eval_s = 0.0
        self.optimizer_s = self.outside_s = 0.0  # outside the model and the optimiser
        self._idle_since: float | None = None
        self.profiled_peak_bytes: int | None = None
        self.peak_shape: tuple[int, int] | None = None  # rows, tokens: the peak's largest batch
        self._steps_here = 0  # in this process: a resumed run warms up again
        self._resident_start = _resident_bytes("VmRSS")
        self._resident_peak = 0
        self._cuda_peak = 0
        self._reset()

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif not _reset_resident_peak():
            self._resident_start = None  # VmHWM would include the loading of the model

    def _collect(self) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            self._cuda_peak = max(self._cuda_peak, peak)
        self._resident_peak = max(self._resident_peak, _resident_bytes("VmHWM") or 0)

    def step(
        self, number: int, take_step: Callable[..., StepResult], **arguments: Any
    ) -> StepResult:
        """Run take_step(number, **arguments), note its cost, return its result."""
        self._steps_here += 1
        profile = self.device.type == "cpu" and self.profiled_peak_bytes is None
        if profile and self._steps_here >= PROFILED_STEP:  # later, if that one was skipped
            results: list[StepResult] = []
            held = tensor_bytes(self.model, self.optimizer)
            peak = peak_tensor_bytes(lambda: results.append(take_step(number, **arguments)))
            self.profiled_peak_bytes, self.peak_shape = held + peak, results[0].shape
            self._idle_since = None
            return results[0]
        start = time.perf_counter()
        result = take_step(number, **arguments)
        end = time.perf_counter()
        if self.profiled_peak_bytes is None:
            self.peak_shape = max(self.peak_shape or (0, 0), result.shape, key=math.prod)
        if self._steps_here > WARMUP_STEPS:
            self.step_s.append(end - start)
            self.step_tokens.append(result.tokens)
            self.optimizer_s += result.optimizer_s
            self.outside_s += end - start - result.model_s - result.optimizer_s
            self.outside_s += 0.0 if self._idle_since is None else start - self._idle_since
        self._idle_since = end
        return result

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Evaluation and writing: timed apart, and kept out of the training phase's peak."""
        self._collect()
        start = time.perf_counter()
        yield
        paused = time.perf_counter() - start
        self.eval_s += paused
        if self._idle_since is not None:
            self._idle_since += paused
        self._reset()

    def times(self) -> dict[str, float | None]:
        """train_s, step_median_s, eval_s and tokens_per_s; None before any step was timed.

        optimizer_frac is what clipping and the optimiser take, over train_s; outside_frac what all
        the rest takes that is not the model: batches, hooks, and the log between two steps. None
        on a GPU, which works while they run.
        """
        total = sum(self.step_s)
        shared = total and self.device.type == "cpu"
        return {
            "train_s": total,
            "timed_steps": len(self.step_s),
            "step_median_s": statistics.median(self.step_s) if self.step_s else None,
            "eval_s": self.eval_s,
            "tokens_per_s": sum(self.step_tokens) / total if total else None,
            "optimizer_frac": self.optimizer_s / total if shared else None,
            "outside_frac": self.outside_s / total if shared else None,
        }

    def memory(self) -> dict[str, int | None]:
        """train_peak_bytes (tensors) and resident_peak_bytes (over the phase's start)."""
        self._collect()
        cuda = self.device.type == "cuda"
        resident = None
        if self._resident_start is not None:
            resident = max(0, self._resident_peak - self._resident_start)
        return {
            "train_peak_bytes": self._cuda_peak if cuda else self.profiled_peak_bytes,
            "resident_peak_bytes": resident,
        }

    def state_dict(self) -> dict:
        return {
            "step_s": self.step_s,
            "step_tokens": self.step_tokens,
            "eval_s": self.eval_s,
            "optimizer_s": self.optimizer_s,
            "outside_s": self.outside_s,
            "profiled_peak_bytes": self.profiled_peak_bytes,
            "peak_shape": self.peak_shape,
        }

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def training_row(
    now: StepResult, lr: float, gauge: Meter, test: UnderTest
) -> dict[str, float | None]:
    """The row of metrics.jsonl for one step: loss, rate, gradient, time, norms."""
    return {
        "train/loss_nats": now.loss_nats,
        "train/penalty": now.penalty,
        "train/grad_norm": now.grad_norm,
        **{f"grad_norm/{role}": norm for role, norm in now.role_norms.items()},
        "train/lr": lr,
        **({"train/loss_scale": test.scaler.get_scale()} if test.scaler.is_enabled() else {}),
        "time/step_s": gauge.step_s[-1] if gauge.step_s else None,
        **factor_norms(test.layers, test.base_norms),
    }


@torch.no_grad()
def factor_norms(
    layers: Mapping[str, AdapterLinear], base_norms: Mapping[str, float]
) -> dict[str, float]:
    """||A||, ||B|| as trained and s||BA|| / ||W|| (Frobenius) of each layer, from k x k products
    alone."""
    row: dict[str, torch.Tensor] = {}
    for path, layer in layers.items():
        if not isinstance(layer, LowRankLinear):
            continue
        B, A = layer.factors()
        squared = ((B.T @ B).double() * (A @ A.T).double()).sum().clamp_min(0)
        for role, parameter in layer.roles().items():
            if parameter.ndim == 2:
                row[f"norm/{role}/{path}"] = parameter.norm()
        row[f"norm/relative/{path}"] = squared.sqrt()
    numbers = torch.stack([norm.double() for norm in row.values()]).tolist() if row else []
    found = dict(zip(row, numbers, strict=True))
    for path, layer in layers.items():
        if (name := f"norm/relative/{path}") in found and layer.scale is not None:
            found[name] = layer.scale * found[name] / base_norms[path]
    return found
