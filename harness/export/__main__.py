"""From a trained adapter to what other tools read.

python -m harness.export outputs/<experiment>/<run> --merged out/ [--dtype bf16]
python -m harness.export outputs/<experiment>/<run> --peft out/ [--uniform]

A run leaves its adapter in PEFT's format anyway; --peft writes it again, or turns one of PEFT's,
such as an AdaLoRA, into plain LoRA.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import command
from harness.export import native, peft_format
from harness.export.merged import DTYPES, STORES, export_merged, report_path, report_text


@dataclass(frozen=True)
class Action:
    """One thing to make of an adapter, asked for by --<name> OUT.

    Args:
        run: does it and prints what it did.
        options: those that belong to it; given without it they are an error.
    """

    run: Callable[[argparse.Namespace], None]
    options: tuple[str, ...] = ()


def write_merged(options: argparse.Namespace) -> None:
    report = export_merged(
        options.run,
        options.merged,
        dtype=options.dtype,
        requantize=options.requantize,
        force=options.force,
    )
    print(report_text(report))
    out = options.merged.resolve()
    print(f"\nwrote {out}, a transformers folder, and {report_path(out).name} beside it")


def write_peft(options: argparse.Namespace) -> None:
    out = options.peft.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / peft_format.CONFIG).is_file():
            raise ValueError(f"{out} holds something else; give another folder.")
        if not options.force:
            raise ValueError(f"{out} holds an adapter; --force replaces it.")
    restored = native.restore(options.run, force=options.force)

    def write(folder: Path) -> None:
        peft_format.write(
            folder,
            model=restored.model,
            layers=restored.layers,
            base=restored.base.name,
            config=restored.config,
            head=restored.base.head,
            uniform=options.uniform,
        )

    native.write_folder(out, write)
    print(*restored.notes, f"wrote {out}, an adapter for PEFT", sep="\n")


ACTIONS = {
    "merged": Action(write_merged, options=("dtype", "requantize")),
    "peft": Action(write_peft, options=("uniform",)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A user's mistake ends it with one sentence and exit code 1."""
    parser = command.parser("harness.export", __doc__)
    add = parser.add_argument
    add("run", type=Path, help="a run's folder, or its adapter's")
    add("--merged", type=Path, metavar="OUT", help="write the merged model to this folder")
    add("--dtype", help=f"of the merged model: {', '.join(DTYPES)}; the base's if absent")
    add("--requantize", help=f"round the merged weights once more, through {', '.join(STORES)}")
    add("--peft", type=Path, metavar="OUT", help="write the adapter in PEFT's format there")
    add("--uniform", action="store_true", help="all layers of one rank, with lora_alpha = r")
    add("--force", action="store_true", help="replace what was exported; accept another base")
    options = parser.parse_args(arguments)
    chosen = [name for name in ACTIONS if getattr(options, name) is not None]
    for name, action in ACTIONS.items():
        for option in action.options:
            if name not in chosen and getattr(options, option):
                parser.error(f"--{option} belongs to --{name}")
    if not chosen:
        parser.error(f"nothing to do: give {' or '.join(f'--{name} OUT' for name in ACTIONS)}")
    for name in chosen:
        command.run(ACTIONS[name].run, options)


if __name__ == "__main__":
    main()
