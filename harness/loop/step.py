"""One optimiser step, the same for every variant; the only place where the loss is put together."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import variants
from harness.config.build import UnderTest
from harness.config.settings import Settings
from harness.machine import distributed
from harness.tasks.batch import Batch
from variants.layer import AdapterLinear
from variants.method import RankAllocator, Variant
from variants.streams import stream_seed


class NonFiniteLoss(ValueError):
    """Training diverged: the loss or the gradient is NaN or infinite."""


UNSCALED = torch.amp.GradScaler(enabled=False)


@dataclass(frozen=True)
class StepResult:
    loss_nats: float  # the task's loss alone, the mean over the step's learned targets
    penalty: float  # the variant's weighted penalty
    grad_norm: float  # before clipping; not finite where the scaled loss has overflowed
    tokens: int  # of all processes
    shape: tuple[int, int]  # rows and tokens of the largest batch, padding included
    log: dict[str, float]  # what the allocator reports
    model_s: float  # in forward and backward passes, on a CPU
    optimizer_s: float  # in clipping and the optimiser's step
    role_norms: dict[str, float] = field(default_factory=dict)  # the gradient's, where asked for

    @property
    def overflowed(self) -> bool:
        """True if the gradient of the scaled loss has left float16, and the optimiser did not take
        the step: the next one has a smaller scale."""
        return not math.isfinite(self.grad_norm)


def training_step(
    step: int,
    *,
    model: nn.Module,
    layers: Mapping[str, AdapterLinear],
    variant: Variant,
    optimizer: torch.optim.Optimizer,
    allocator: RankAllocator | None,
    loss: Callable[[nn.Module, Any], torch.Tensor],
    batches: Iterator[Any],
    device: torch.device,
    seed: int,
    rate_factor: float,
    absolute_factor: float | None = None,
    accumulation: int = 1,
    clip_norm: float | None = None,
    scaler: torch.amp.GradScaler = UNSCALED,
    norms: bool = False,
) -> StepResult:
    """Forward and backward `accumulation` times, penalty, clip, step, hooks, zero_grad: in this
    order.

    What is minimised is the sum over the learned targets of the step (tokens, or rows of a
    classifier) divided by their number, so that rows count alike in however many microsteps and
    processes they lie; the penalty is added once.

    In float16 small gradients would be 0, so the loss is scaled before the backward pass and the
    gradient unscaled after it (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2). The sum
    over the processes comes before, so that all find the same overflow and keep the same scale.

    Args:
        step: 1 for the first; with `seed`, all that dropout depends on.
        rate_factor: what the groups' `initial_lr` are multiplied by in this step.
        absolute_factor: the same for groups with an absolute rate; None for `rate_factor`.
        scaler: of the loss; disabled where nothing is float16.
        norms: also look at the gradient role by role, which waits for a device once more.

    A gradient that is not finite, of a finite loss at a scale above 1, is an overflow: the step is
    not taken, and the next one has half the scale. Raises NonFiniteLoss for any other, before the
    optimiser takes this step; nothing but the scale has changed then.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    microsteps = [next(batches) for _ in range(accumulation)]
    total = sum(batch.learned for batch in microsteps)
    own_share = model_s = 0.0
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # the loss, the penalty
    for microstep, batch in enumerate(microsteps):
        part = own_part(batch)
        share = part.learned / total
        own_share += share
        seed_forward(seed, step, microstep, distributed.rank())
        variants.begin_step(layers, step, microstep)
        began = time.perf_counter()
        task_loss = loss(model, part.to(device))
        scaler.scale(task_loss * share).backward()
        model_s += time.perf_counter() - began
        sums[0] += task_loss.detach().double() * share
    began = time.perf_counter()
    penalty = variant.penalty(layers)  # afterwards, or it would be held together with the logits
    if penalty is not None:
        scaler.scale(penalty * own_share).backward()
        sums[1] = penalty.detach().double() * own_share
    model_s += time.perf_counter() - began
    sums = distributed.sum_over_processes(parameters, sums)
    began = time.perf_counter()
    scaler.unscale_(optimizer)
    by_role = gradient_norms(optimizer) if norms else {}
    limit = math.inf if clip_norm is None else clip_norm
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    # The only wait for a device: whether the step may be taken.
    loss_nats, penalty_sum, grad_norm = torch.cat([sums, norm.to(sums).view(1)]).tolist()
    finite = math.isfinite(loss_nats + penalty_sum)
    log: dict[str, float] = {}
    if finite and math.isfinite(grad_norm):
        for group in optimizer.param_groups:
            held = absolute_factor is not None and group.get("absolute", False)
            group["lr"] = group["initial_lr"] * (absolute_factor if held else rate_factor)
        optimizer.step()
        scaler.update()
        optimizer_s = time.perf_counter() - began
        log = variants.after_step(layers, optimizer, step, allocator)
    else:
        optimizer.zero_grad(set_to_none=True)  # the step may be skipped
        if not (_backs_off(scaler) and finite):
            raise NonFiniteLoss(_diverged(step, loss_nats, grad_norm, layers))
        optimizer_s = time.perf_counter() - began
    optimizer.zero_grad(set_to_none=True)
    tokens = sum(batch.n_tokens for batch in microsteps)
    shape = max((batch.inputs["input_ids"].shape for batch in microsteps), key=math.prod)
    return StepResult(
        loss_nats, penalty_sum, grad_norm, tokens, tuple(shape), log, model_s, optimizer_s, by_role
    )


@torch.no_grad()
def gradient_norms(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The norm of the gradient as it is now, over all parameters of each role; of a role without
    one none."""
    found: dict[str, list[torch.Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                found.setdefault(group.get("name", "all"), []).append(parameter.grad.norm())
    norms = [torch.stack(own).norm() for own in found.values()]
    return dict(zip(found, torch.stack(norms).tolist() if norms else [], strict=True))


def _backs_off(scaler: torch.amp.GradScaler) -> bool:
    """Take a smaller scale, after a gradient that is not finite. False if that cannot help: there
    is no scale, or it is 1 and the gradient itself is not finite."""
    before = scaler.get_scale()
    scaler.update()
    return before > 1.0 and scaler.get_scale() < before


def _diverged(
    step: int, loss_nats: float, grad_norm: float, layers: Mapping[str, AdapterLinear]
) -> str:
    norms = {
        f"{path}.{role}": float(parameter.detach().norm())
        for path, layer in layers.items()
        for role, parameter in layer.roles().items()
    }
    largest = sorted(norms.items(), key=lambda pair: -pair[1])[:3]
    listed = ", ".join(f"{name} {norm:.3g}" for name, norm in largest)
    return (
        f"training diverged at step {step}: loss {loss_nats:.4g} nats, gradient norm "
        f"{grad_norm:.4g} (largest parameter norms: {listed}); a lower variant.lr may help."
    )


def seed_forward(seed: int, step: int, microstep: int = 0, process: int = 0) -> None:
    """Reseed the global generators before a forward pass, so that the base's own dropout depends
    on where training is, not on what a variant has drawn."""
    torch.manual_seed(stream_seed(seed, "forward", step, microstep, process))


def prepared(
    settings: Settings, test: UnderTest, loss: Callable[[nn.Module, Any], torch.Tensor]
) -> Callable[..., StepResult]:
    """`training_step` of a run, of which the step, its batches and its rate are left to give."""
    return functools.partial(
        training_step,
        model=test.model,
        layers=test.layers,
        variant=test.variant,
        optimizer=test.optimizer,
        allocator=test.allocator,
        scaler=test.scaler,
        loss=loss,
        device=settings.device,
        seed=settings.seed,
        accumulation=settings.train.accumulation,
        clip_norm=settings.train.clip_norm,
    )


def own_part(batch: Batch) -> Batch:
    """This process's rows of a batch, padded as the whole of it. `rows` and `n_tokens` stay those
    of the batch.

    Raises ValueError if the rows cannot be dealt out evenly.
    """
    if distributed.world_size() == 1:
        return batch
    count = len(batch.labels)
    if count % distributed.world_size():
        raise ValueError(
            f"train has batches of {count} rows, which {distributed.world_size()} processes cannot "
            "share evenly; use fewer processes or a smaller train.batch_size."
        )
    each = count // distributed.world_size()
    own = slice(distributed.rank() * each, (distributed.rank() + 1) * each)
    inputs = {name: tensor[own] for name, tensor in batch.inputs.items()}
    return dataclasses.replace(batch, inputs=inputs, labels=batch.labels[own])
