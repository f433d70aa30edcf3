"""From a trained adapter to what other tools read.

python -m harness.adapter.export outputs/<experiment>/<run> --merged out/ [--dtype bf16]
python -m harness.adapter.export outputs/<experiment>/<run> --peft out/ [--uniform]

A run leaves its adapter in PEFT's format anyway; --peft writes it again, or turns one of PEFT's,
such as an AdaLoRA, into plain LoRA.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness import cli
from harness.adapter.folders import adapter_folder, free_for_adapter, free_for_merged, report_path


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
    adapter_folder(options.run)
    free_for_merged(options.merged, replace=options.replace)
    from harness.adapter.merged import export_merged, report_text

    report = export_merged(
        options.run,
        options.merged,
        dtype=options.dtype,
        requantize=options.requantize,
        packed=options.packed,
        replace=options.replace,
        force=options.force,
    )
    print(report_text(report))
    out = options.merged.resolve()
    print(f"\nwrote {out}, a transformers folder, and {report_path(out).name} beside it")


def write_peft(options: argparse.Namespace) -> None:
    adapter_folder(options.run)
    out = free_for_adapter(options.peft, replace=options.replace)
    from harness.adapter import peft_format
    from harness.adapter.restore import restore
    from harness.disk.write import new_folder

    restored = restore(options.run, force=options.force)
    try:
        with new_folder(out) as folder:
            peft_format.write(
                folder,
                model=restored.model,
                layers=restored.layers,
                base=restored.base.name,
                config=restored.config,
                head=restored.base.head,
                uniform=options.uniform,
            )
    except peft_format.NotLowRank as error:
        raise ValueError(f"{error}; --merged writes the whole model.") from None
    print(*restored.notes, f"wrote {out}, an adapter for PEFT", sep="\n")


ACTIONS = {
    "merged": Action(write_merged, options=("dtype", "requantize", "packed")),
    "peft": Action(write_peft, options=("uniform",)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A user's mistake ends it with one sentence and exit code 1."""
    parser = cli.parser("harness.adapter.export", __doc__)
    add = parser.add_argument
    add("run", type=cli.path, help="a run's folder, or its adapter's")
    add("--merged", type=cli.path, metavar="OUT", help="write the merged model to this folder")
    add("--dtype", help="of the merged model: float32, bf16 or fp16; the base's if absent")
    add("--requantize", help="round the merged weights once more, through nf4 or int8")
    add("--packed", action="store_true", help="with --requantize: save codes, as bitsandbytes does")
    add("--peft", type=cli.path, metavar="OUT", help="write the adapter in PEFT's format there")
    add("--uniform", action="store_true", help="all layers of one rank, with lora_alpha = r")
    add("--replace", action="store_true", help="what was exported there before")
    add("--force", action="store_true", help="accept another base than it was trained on")
    options = parser.parse_args(arguments)
    chosen = [name for name in ACTIONS if getattr(options, name) is not None]
    for name, action in ACTIONS.items():
        for option in action.options:
            if name not in chosen and getattr(options, option):
                parser.error(f"--{option} belongs to --{name}")
    if not chosen:
        parser.error(f"nothing to do: give {' or '.join(f'--{name} OUT' for name in ACTIONS)}")
    for name in chosen:
        cli.run(ACTIONS[name].run, options)


if __name__ == "__main__":
    main()
