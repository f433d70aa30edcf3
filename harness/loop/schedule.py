"""Learning-rate schedules: pure functions of the step, so that there is no state to resume."""

import math

from variants.settings import check_type


def _check(steps: int, warmup_frac: float, warmup_steps: int | None) -> int:
    """The number of warm-up steps, fewer than `steps`: those given, or that part of all. Raises
    ValueError on a wrong value."""
    check_type("schedule.warmup_steps", warmup_steps, int | None)
    check_type("schedule.warmup_frac", warmup_frac, float)
    if not 0.0 <= warmup_frac < 1.0:
        raise ValueError(f"schedule.warmup_frac is {warmup_frac}; it must lie in [0, 1).")
    key, value = "warmup_frac", warmup_frac
    warmup = round(warmup_frac * steps)
    if warmup_steps is not None:
        key, value, warmup = "warmup_steps", warmup_steps, warmup_steps
    if warmup < 0:
        raise ValueError(f"schedule.warmup_steps is {warmup}; it must be at least 0.")
    if warmup >= steps:
        raise ValueError(
            f"schedule.{key} is {value}, which leaves none of {steps} steps after the warm-up; "
            "reduce it or train longer."
        )
    return warmup


def constant(
    step: int, steps: int, *, warmup_frac: float = 0.0, warmup_steps: int | None = None
) -> float:
    """The multiple of the peak rate at `step` (1 to `steps`): a linear warm-up, then 1."""
    warmup = _check(steps, warmup_frac, warmup_steps)
    return min(1.0, step / (warmup + 1))


def linear(
    step: int, steps: int, *, warmup_frac: float = 0.0, warmup_steps: int | None = None
) -> float:
    """A linear warm-up, then a line to 0 just after the last step."""
    warmup = _check(steps, warmup_frac, warmup_steps)
    return min(step / (warmup + 1), (steps - step + 1) / (steps - warmup))


def cosine(
    step: int, steps: int, *, warmup_frac: float = 0.0, warmup_steps: int | None = None
) -> float:
    """A linear warm-up, then half a cosine to 0 just after the last step."""
    warmup = _check(steps, warmup_frac, warmup_steps)
    if step <= warmup:
        return step / (warmup + 1)
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup - 1) / (steps - warmup)))
