"""Step time and memory of every variant and of peft's methods over one floor, in one process.

    python -m harness.bench
    python -m harness.bench --model llama_blocks --tokens 4x128 --rank 16
    python -m harness.bench --variant lora --variant dora --rounds 31 --json bench.json
    python -m harness.bench --model llama_7b --device cuda --dtype bfloat16 --tokens 4x1024 \
        --rank 16 --dropout 0 --no-full

harness/bench/rows.py says what a row is, harness/bench/measure.py how it is measured. --profile
adds what the steps are made of. --check ends with 1 if a target of harness/bench/targets.yaml is
missed by more than the noise measured.
"""

import argparse
import json
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from harness import cli
from harness.bench import profile, report
from harness.bench.measure import MAX_ROUNDS, measure, summarize
from harness.bench.rows import (
    ALPHA_OVER_RANK,
    Bench,
    all_rows,
    draw_batch,
    load_base,
    load_variant,
    outline_base,
    variant_names,
)
from harness.disk.write import write_text
from harness.machine.hardware import resolve_device
from harness.memory.advice import is_out_of_memory
from variants import inject

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _rounds(text: str) -> int:
    if (rounds := _positive(text)) > MAX_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text} is more than {MAX_ROUNDS}")
    return rounds


def _batch_size(text: str) -> tuple[int, int]:
    try:
        rows, tokens = (_positive(part) for part in text.split("x"))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{text} is not <rows>x<tokens>, for example 32x32"
        ) from None
    return rows, tokens


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print. A user's mistake ends it with one sentence."""
    parser = cli.parser("harness.bench", __doc__)
    add = parser.add_argument
    add("--model", default="minilm", help="a file of conf/model (minilm)")
    add("--variant", action="append", help="a file of conf/variant; all if absent")
    add("--rank", type=_positive, default=8)
    add("--dropout", type=_fraction, default=0.1, help="0 leaves its rows out")
    add("--tokens", type=_batch_size, default=(32, 32), help="rows x tokens (32x32)")
    add("--active-rank", type=_fraction, action="append", default=[], metavar="PART",
        help="a row more for each variant whose rank adapts, with so much of its rank in use",
    )  # fmt: skip
    add("--rounds", type=_rounds, default=15)
    add("--threads", type=_positive, default=2)
    add("--device", default="cpu", help="cpu, cuda or cuda:n (cpu)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--compile", action="store_true", help="all rows by torch.compile")
    either = argparse.BooleanOptionalAction
    add("--full", action=either, default=True,
        help="with rows that train whole matrices, one of them every parameter of the model",
    )  # fmt: skip
    add("--peer", action=either, default=True)
    add("--profile", action="store_true", help="say what the steps are made of")
    add("--json", type=cli.path, help="write all that was measured to this file")
    add("--plot", type=cli.path, help="write a figure of it to this SVG file")
    add("--check", action="store_true", help="end with 1 if a target is missed")
    cli.run(run, parser.parse_args(arguments))


def _applicable(options: argparse.Namespace) -> list[str]:
    """Lists the variants, without those that need what the model lacks, such as biases, and with
    --no-full those that keep no frozen weight; it prints each name that it leaves out. They are
    tried on shapes alone."""
    names = []
    for name in variant_names():
        variant, _ = load_variant(name, options.rank, 0.0)
        base = outline_base(options.model, options.dtype)
        try:
            layers = inject(base.model, variant, seed=0, head=base.head).values()
            variant.groups(base.model, lr=variant.lr)
        except ValueError as error:
            print(f"{name} is left out: {error}")
            continue
        if options.full or all(layer.store is not None for layer in layers):
            names.append(name)
        else:
            print(f"{name} is left out: it keeps no frozen weight, and --no-full is given")
    return names


def run(options: argparse.Namespace) -> None:
    for name in ("json", "plot"):
        file = getattr(options, name)
        if file and not file.absolute().parent.is_dir():
            raise ValueError(f"--{name} is {file}, and there is no folder {file.parent}.")
    if options.check:
        report.missed(options.model, [])  # whether there are targets, before the work
    device = resolve_device(options.device, [options.dtype], setting="--device")
    if options.profile and device.type != "cpu":
        raise ValueError("--profile times operations on a CPU; leave --device out.")
    torch.set_num_threads(options.threads)
    peers = options.peer and find_spec("peft") is not None
    if options.peer and not peers:
        print('peft is not installed, so its rows are left out: pip install -e ".[peers]"')
    # What peft and bitsandbytes say of their own insides is nothing that a user here could mend.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    names = list(dict.fromkeys(options.variant or _applicable(options)))
    try:
        base, found = _measured(options, names, device, peers=peers)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        left = ["--no-full"] * options.full + ["--no-peer"] * peers
        raise ValueError(
            "there is not enough memory for all rows, which are held at once: name fewer with "
            f"--variant, or give {', '.join([*left, 'fewer --tokens'])}."
        ) from error
    tokens = math.prod(options.tokens)
    found = [{**row, "tokens_per_s": tokens / row["step_s"]} for row in found]
    settings = {
        "base": base,
        "rows": options.tokens[0],
        "tokens": options.tokens[1],
        "rank": options.rank,
        "alpha": ALPHA_OVER_RANK * options.rank,
        "dropout": options.dropout,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "compiled": options.compile,
        "threads": options.threads,
        "rounds": options.rounds,
        "versions": {name: version(name) for name in PACKAGES if find_spec(name)},
    }
    intervals = any(row["step_over_floor"]["low"] is not None for row in found)
    kind = "median [95 % interval]" if intervals else "median (of too few rounds for an interval)"
    print(f"{report.describe(settings)}, {kind}\n\n{report.table(found)}")
    if options.profile:
        print(f"\n{profile.table(found)}\n{profile.NOTE}")
    if options.json:
        text = json.dumps({"settings": settings, "rows": found}, indent=2)
        write_text(options.json, text + "\n")
    if options.plot:
        write_text(options.plot, report.figure(settings, found))
    if options.check and (sentences := report.missed(options.model, found)):
        sys.exit("\n".join(["", "missed:", *sentences]))


def _measured(
    options: argparse.Namespace, names: Sequence[str], device: torch.device, *, peers: bool
) -> tuple[str, list[dict[str, Any]]]:
    """The name of the base, and what was found of each row."""
    base = load_base(options.model, options.dtype)
    base.model.to(device)  # type: ignore[arg-type]
    batch = draw_batch(base, *options.tokens)
    bench = Bench(
        base=base,
        batch={name: tensor.to(device) for name, tensor in batch.items()},
        rank=options.rank,
        dropout=options.dropout,
        compiled=options.compile,
    )
    rows = all_rows(bench, names, peers=peers, active_fracs=options.active_rank, full=options.full)
    found = summarize(rows, measure(rows, options.rounds))
    if options.profile:
        profiles = profile.profile(rows, options.rounds, options.rank)
        found = [{**row, "profile_s": profiles[row["name"]]} for row in found]
    return base.name, found


if __name__ == "__main__":
    main()
