"""Batches that fit a card, from a configuration alone: no weight is read.

    python -m harness.memory model=hf model.name=./Llama-3-8B
    python -m harness.memory model=smollm2 variant=dora,full rank=64 task.max_tokens=512
    python -m harness.memory model=hf model.name=org/model train.activation_checkpointing=true

Overrides are those of train.py; variant, train.batch_size and task.max_tokens may be lists. What is
not given is as in settings.yaml in this folder: a bfloat16 model on a GPU. Each cell is the
estimated peak of a training step in GB (10^9 bytes), of rows as long as they may be, and in
brackets the smallest of the cards that it fits in, with the reserve that settings.yaml names.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from harness import cli
from harness.config import build
from harness.config.overrides import pairs_of
from harness.memory.advice import SETTINGS
from harness.memory.estimate import BatchShape, Estimate, Estimator
from harness.words import count

SWEPT = ("variant", "train.batch_size", "task.max_tokens")


def card(total_bytes: int) -> int | None:
    """The smallest card, in GB, that a peak fits in; None if none does."""
    needed = total_bytes * (1 + SETTINGS["fragments_frac"]) / 1e9 + SETTINGS["reserved_gb"]
    return next((gb for gb in SETTINGS["cards_gb"] if needed <= gb), None)


def overrides_of(arguments: Sequence[str]) -> dict[str, str]:
    """Key -> value, with the defaults of settings.yaml for what is not given."""
    return dict(pairs_of([*SETTINGS["overrides"], *arguments]))


def integers(values: Sequence[str], key: str) -> list[int]:
    """Raises ValueError for what is not a positive whole number."""
    for value in values:
        if not (value.isdigit() and int(value) > 0):
            raise ValueError(f"{key} is {value}; it must be a positive whole number.")
    return [int(value) for value in values]


def estimator(config: Mapping[str, Any]) -> Estimator:
    """The estimator of a language model; of a classifier where the model is an encoder."""
    try:
        return Estimator(config, None)
    except ValueError:
        return Estimator(config, ("0", "1"))


def table(arguments: Sequence[str]) -> str:
    """The table for these overrides. Raises ValueError for a mistake in them."""
    given = overrides_of(arguments)
    swept = {key: given.pop(key).strip("[]").replace(" ", "").split(",") for key in SWEPT}
    held = [f"{key}={value}" for key, value in given.items()]
    rows = integers(swept["train.batch_size"], "train.batch_size")
    lengths = integers(swept["task.max_tokens"], "task.max_tokens")
    lines: list[str] = []
    for name in swept["variant"]:
        config = build.compose([*held, f"variant={name}"])
        with_shapes = estimator(config)
        fitting = [tokens for tokens in lengths if tokens <= with_shapes.max_tokens]
        if not fitting:
            raise ValueError(
                f"task.max_tokens is {min(lengths)}; the model has {with_shapes.max_tokens} "
                "positions."
            )
        cells = {
            (b, t): with_shapes.at(BatchShape(b, t, padded=False)) for b in rows for t in fitting
        }
        if not lines:
            lines += _header(config, with_shapes, fitting)
        first = next(iter(cells.values()))
        fixed = [first.weights_bytes, first.adapters_bytes, first.optimizer_bytes]
        for b in rows:
            shown = [name, *(f"{held / 1e9:.2f}" for held in fixed)] if b == rows[0] else [""] * 4
            row = "".join(f"{_cell(cells[b, t]):>16}" for t in fitting)
            lines.append("{:<12}{:>9}{:>10}{:>11}".format(*shown) + f"{b:>6}{row}")
    return "\n".join(lines)


def _header(config: Mapping[str, Any], shapes: Estimator, lengths: Sequence[int]) -> list[str]:
    train = config["train"]
    said = [
        f"{config['model'].get('name') or config['model']['_target_'].split('.')[-2]}: "
        f"{count(shapes.parameters_total)} parameters in {config['model']['dtype']}",
        f"products in {train['compute_dtype']}",
        f"rank {config['rank']}",
        config["optimizer"]["_target_"].rpartition(".")[2],
        f"activation checkpointing {'on' if train['activation_checkpointing'] else 'off'}",
    ]
    columns = "".join(f"{f'{t} tokens':>16}" for t in lengths)
    return [
        ", ".join(said),
        "GB at the peak of a step (smallest card that it fits in)",
        "",
        f"{'':<12}{'weights':>9}{'adapters':>10}{'optimizer':>11}{'rows':>6}{columns}",
    ]


def _cell(estimate: Estimate) -> str:
    fits = card(estimate.total_bytes)
    return f"{estimate.total_bytes / 1e9:.1f} ({fits or '-'})"


def main() -> None:
    cli.run(lambda arguments: print(table(arguments)), sys.argv[1:])


if __name__ == "__main__":
    main()
