"""The held settings of a run as plain typed values, checked once."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from variants.checks import check_positive, check_type
from variants.inject import accepted_options
from variants.select import nearest

IN_A_ROW = 10  # steps that were skipped: the training itself is lost


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
    keep_checkpoints: int | None
    resume: str
    on_nonfinite: str
    device: str
    compute_dtype: str
    threads: int | None
    activation_checkpointing: bool
    compile: bool
    evaluate_test: bool

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
        for key, allowed in (("on_nonfinite", ("stop", "skip")), ("resume", ("strict", "anyway"))):
            if (value := getattr(self, key)) not in allowed:
                raise ValueError(
                    f"train.{key} is {value!r}; it must be {' or '.join(allowed)}."
                    f"{nearest(value, allowed)}"
                )

    def may_skip(self, skipped: Sequence[int]) -> bool:
        """True to go on after steps without a finite gradient were skipped, the last one now."""
        row = [*range(skipped[-1] - IN_A_ROW + 1, skipped[-1] + 1)]
        return self.on_nonfinite == "skip" and [*skipped[-IN_A_ROW:]] != row


TOP_LEVEL: Mapping[str, Any] = {
    "seed": int,
    "rank": int,
    "alpha": float,
    "dropout": float,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "bias": str,
    "train_modules": list,
    "partial": bool,
    "init_from": str | None,
    "force": bool,
    "dry_run": bool,
    "rate_test": bool,
    "free": list,
    "outputs_dir": str,
    "run_dir": str | None,
    "strategy": str,
}


def check_top_level(config: Mapping[str, Any]) -> None:
    """Check the types of the top-level keys; raise ValueError naming the first wrong one."""
    for key, expected in TOP_LEVEL.items():
        check_type(key, config[key], expected)
    for key in ("train_modules", "free"):
        for entry in config[key]:
            check_type(f"an entry of {key}", entry, str)
    check_positive("variant.lr", config["variant"]["lr"])


def check_call(partial: Any, where: str, given: Collection[str] = ()) -> None:
    """Raise ValueError if a partial call is none, or holds an option that its target would not
    read.

    Args:
        partial: a functools.partial, or anything else with `func` and `keywords`.
        where: the config node it was made of, for the message: "optimizer".
        given: what the call itself fills in, such as seed; in the partial it would be lost.
    """
    if not (hasattr(partial, "func") and hasattr(partial, "keywords")):
        raise ValueError(f"{where} is {partial!r}; it must be a mapping with a _target_.")
    accepted = accepted_options(partial.func, given)
    for option in partial.keywords:
        if accepted is not None and option not in accepted:
            raise ValueError(
                f"{where} would ignore the option {option}.{nearest(option, accepted)}"
            )
