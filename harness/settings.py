"""The held settings of a run as plain typed values, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The keys of `train:` in conf/config.yaml. Raises ValueError on a wrong type or range."""

    steps: int
    batch_size: int
    accumulation: int
    clip_norm: float | None
    eval_batch_size: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    device: str
    compute_dtype: str
    threads: int | None
    activation_checkpointing: bool
    compile: bool

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for field in fields(self):
            check_type(f"train.{field.name}", getattr(self, field.name), hints[field.name])
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise ValueError(f"train.{field.name} is {value}; it must be positive.")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"train.compute_dtype is {self.compute_dtype!r}; it must be float32 or bfloat16."
            )


def check_type(key: str, value: Any, expected: Any) -> None:
    """Raise ValueError unless `value` is of the type `expected` (int counts as a float)."""
    allowed = get_args(expected) or (expected,)
    if type(value) in allowed or (type(value) is int and float in allowed):
        return
    names = {
        "NoneType": "null",
        "str": "text",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "list": "a list",
        "dict": "a mapping",
    }
    wanted = " or ".join(names[kind.__name__] for kind in allowed)
    raise ValueError(f"{key} is {value!r}; it must be {wanted}.")


TOP_LEVEL: Mapping[str, Any] = {
    "seed": int,
    "rank": int,
    "alpha": float,
    "dropout": float,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "bias": str,
    "train_modules": list,
    "force": bool,
    "dry_run": bool,
    "rate_test": bool,
    "free": list,
    "outputs_dir": str,
    "run_dir": str | None,
}


def check_top_level(config: Mapping[str, Any]) -> None:
    """Check the types of the top-level keys; raise ValueError naming the first wrong one."""
    for key, expected in TOP_LEVEL.items():
        check_type(key, config[key], expected)
    rate = config["variant"]["lr"]
    check_type("variant.lr", rate, float)
    if not rate > 0:
        raise ValueError(f"variant.lr is {rate}; it must be positive.")
