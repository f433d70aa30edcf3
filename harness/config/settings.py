"""The held settings of a run as plain typed values, checked once."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    import torch

from variants.inject import accepted_options
from variants.select import nearest
from variants.settings import check_positive, check_type

IN_A_ROW = 10  # steps that were skipped: the training itself is lost


def _check_kinds(settings: Any, prefix: str = "") -> None:
    """Raise ValueError unless each field of a dataclass is of its annotation's type."""
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        if not is_dataclass(hints[field.name]):
            value = getattr(settings, field.name)
            check_type(prefix + field.name, value, hints[field.name])


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
        _check_kinds(self, "train.")
        for key, value in asdict(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise ValueError(f"train.{key} is {value}; it must be positive.")
        for key, allowed in (
            ("compute_dtype", ("float32", "bfloat16", "float16")),
            ("on_nonfinite", ("stop", "skip")),
            ("resume", ("strict", "anyway")),
        ):
            if (value := getattr(self, key)) not in allowed:
                raise ValueError(
                    f"train.{key} is {value!r}; it must be {' or '.join(allowed)}."
                    f"{nearest(value, allowed)}"
                )

    def may_skip(self, skipped: Sequence[int]) -> bool:
        """True to go on after steps without a finite gradient were skipped, the last one now."""
        row = [*range(skipped[-1] - IN_A_ROW + 1, skipped[-1] + 1)]
        return self.on_nonfinite == "skip" and [*skipped[-IN_A_ROW:]] != row


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run, checked once. Raises ValueError on a wrong type or range.

    Args:
        config: all of it as plain values, which is what is recorded and digested. The parts that
            become objects (model, task, variant, optimizer, schedule, tracking) are checked where
            they are built.
        notes: sentences that a reader of the result should know.

    The others are the keys of the same name in conf/config.yaml.
    """

    config: dict
    train: TrainSettings
    seed: int
    rank: int
    alpha: float | None
    dropout: float
    rank_pattern: dict
    alpha_pattern: dict
    bias: str
    train_modules: list
    partial: bool
    init_from: str | None
    force: bool
    dry_run: bool
    rate_test: bool
    free: list
    outputs_dir: str
    run_dir: str | None
    strategy: str
    notes: list

    @classmethod
    def of(cls, config: dict, notes: Sequence[str] = ()) -> "Settings":
        """Those of a resolved config, in plain values."""
        made = ("config", "train", "notes")
        own = {f.name: config[f.name] for f in fields(cls) if f.name not in made}
        train = TrainSettings(**config["train"])
        return cls(config=config, train=train, notes=[*notes], **own)

    def __post_init__(self):
        _check_kinds(self)
        for key in ("train_modules", "free"):
            for entry in getattr(self, key):
                check_type(f"an entry of {key}", entry, str)
        check_positive("variant.lr", self.config["variant"]["lr"])
        if self.dry_run and self.rate_test:
            raise ValueError("dry_run keeps nothing and rate_test keeps its plot; choose one.")

    @property
    def keeps_nothing(self) -> bool:
        return self.dry_run or self.rate_test

    @property
    def device(self) -> "torch.device":
        import torch

        return torch.device(self.train.device)

    @property
    def dtypes(self) -> tuple[str, str]:
        """Those that the model computes in and is kept in."""
        return self.train.compute_dtype, self.config["model"]["dtype"]


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
