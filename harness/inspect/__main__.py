"""The content of trained adapters: spectra, ranks, sizes, directions, and how alike two runs are.

python -m harness.inspect <run> [<run> ...] [--dense] [--out <folder>]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness import cli
from harness.adapter.folders import adapter_folder

if TYPE_CHECKING:
    from harness.inspect.report import Report

OURS = {"page.html", "inspect.json"}  # what the folder holds


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A user's mistake ends it with one sentence and exit code 1."""
    parser = cli.parser("harness.inspect", __doc__)
    add = parser.add_argument
    add("runs", type=cli.path, nargs="+", metavar="run",
        help="a finished run's folder, or an adapter's")  # fmt: skip
    add("--out", type=cli.path,
        help="write page.html and inspect.json there; else <first run>/inspect")  # fmt: skip
    add("--dense", action="store_true", help="SVDs of W and W' too: intruder dimensions, W's own "
        "top directions, the spectrum of a dW that is not low-rank")  # fmt: skip
    add("--top", type=int, help="with --dense: leading left singular vectors of W' (10)")
    add("--epsilon", type=float, help="with --dense: the cosine to every left singular vector of W "
        "below which one of them is an intruder dimension (0.5)")  # fmt: skip
    cli.run(_run, parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> None:
    if not options.dense and (options.top, options.epsilon) != (None, None):
        raise ValueError("--top and --epsilon belong to --dense; leave them out or add it.")
    top = 10 if options.top is None else options.top
    epsilon = 0.5 if options.epsilon is None else options.epsilon
    if top < 1:
        raise ValueError(f"--top is {top}; it must be 1 or more.")
    if not 0 < epsilon <= 1:
        raise ValueError(f"--epsilon is {epsilon}; it must lie in (0, 1].")
    folders = [_run_folder(path) for path in options.runs]
    out = options.out.resolve() if options.out else folders[0] / "inspect"
    _check_replaceable(out)
    import torch

    from harness.inspect.measure import compare_all, inspect_run
    from harness.inspect.report import Report, text

    torch.set_num_threads(1)  # the last bits of sums depend on it
    runs = [
        inspect_run(folder, name, dense=options.dense, top=top)
        for folder, name in zip(folders, _names(folders), strict=True)
    ]
    pairs = compare_all(runs)
    report = Report(runs=runs, pairs=pairs, dense=options.dense, top=top, epsilon=epsilon)
    print(text(report))
    _write(report, out)
    print(f"\nwrote {out / 'page.html'} and inspect.json")


def _run_folder(path: Path) -> Path:
    """The run's folder, also where its adapter's was given; of an adapter alone its own."""
    folder = adapter_folder(path.resolve())
    if folder.name == "adapter" and (folder.parent / "run.json").is_file():
        return folder.parent
    return path.resolve()


def _names(folders: Sequence[Path]) -> list[str]:
    """Each folder's name, with a number from the second of the same name on."""
    names: list[str] = []
    for at, folder in enumerate(folders):
        earlier = sum(other.name == folder.name for other in folders[:at])
        names.append(f"{folder.name} ({earlier + 1})" if earlier else folder.name)
    return names


def _check_replaceable(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder as --out.")
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if found and (
        foreign := sorted(found - OURS) or sorted(found if "inspect.json" not in found else ())
    ):
        raise ValueError(
            f"{out} holds {foreign[0]}, which is not of an inspection, so it is not replaced; "
            "give another --out."
        )


def _write(report: "Report", out: Path) -> None:
    cli.needs("matplotlib")
    from harness.disk.write import new_folder
    from harness.inspect import page, plots
    from harness.inspect.report import json_text

    files = {
        "page.html": page.page(report, plots.figures(report)),
        "inspect.json": json_text(report),
    }

    with new_folder(out) as folder:
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
