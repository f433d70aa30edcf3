"""Writes the report of a study and the archive of its runs, whole or not at all."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from harness import cli
from harness.compare import table
from harness.compare.analyse import analysed
from harness.compare.findings import Analysis
from harness.compare.held import check_held
from harness.compare.load import load_study
from harness.compare.plain import plain_study
from harness.compare.rows import identity, read_rows, row
from harness.compare.study import Study, read_study, study_text
from harness.disk.write import make_folder, whole, write_text

# What a report's folder holds; anything else in it, a README.md say, is left alone.
OURS = ("page.html", "table.md", "table.csv", "runs.jsonl", "study.yaml", "figures",
        "report_spec.json")  # fmt: skip


def write_report(folder: Path, out: Path | None = None, *, named: str | None = None) -> Analysis:
    """Load the study in `folder`, analyse it, and write its report.

    Args:
        named: see `load_study`.
        out: None for folder/report. It appears whole or not at all. A report of the same study is
            replaced, and files in it that are not ours stay.

    Raises ValueError as `load_study` does, or if `out` is something else.
    """
    analysis = analysed(load_study(folder, named=named))
    write(analysis, out or folder / "report")
    return analysis


def write(analysis: Analysis, out: Path) -> None:
    """Write a report whole or not at all, with what `out` holds of somebody else."""
    _check_replaceable(out, analysis.study.name)
    make_folder(out.parent, "--out")
    with whole(out) as folder:
        (folder / "figures").mkdir(parents=True)
        for name, text in files(analysis).items():
            (folder / name).write_text(text, encoding="utf-8")
        for theirs in out.iterdir() if out.is_dir() else ():
            if theirs.name in OURS:
                continue
            if theirs.is_dir() and not theirs.is_symlink():
                shutil.copytree(theirs, folder / theirs.name, symlinks=True)
            else:
                shutil.copy2(theirs, folder / theirs.name, follow_symlinks=False)


def files(analysis: Analysis) -> dict[str, str]:
    """The report: name below its folder -> text."""
    cli.needs("matplotlib")
    from harness.compare import page, plots, wandb_report

    figures = plots.figures(analysis)
    spec = wandb_report.report_spec(analysis, list(figures))
    return {
        "page.html": page.page(analysis, figures),
        "table.md": table.markdown(analysis),
        "table.csv": table.csv_text(analysis),
        "runs.jsonl": "".join(row(run) + "\n" for run in analysis.study.runs),
        "study.yaml": study_text(analysis.study),
        **({} if spec is None else {"report_spec.json": spec}),
        **{f"figures/{name}.svg": svg for name, svg in figures.items()},
    }


def _check_replaceable(out: Path, name: str) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "study.yaml").is_file() or not (out / "runs.jsonl").is_file():
        raise ValueError(
            f"{out} exists and is not a report, so it is not replaced; give another --out."
        )
    _check_name(out, name, "--out")


def archive(
    folder: Path, path: Path, *, named: str | None = None, varied: Sequence[str] = ()
) -> tuple[int, Path]:
    """Add the finished runs of a study, which need not be finished, to the runs.jsonl `path`, and
    write study.yaml into its folder; the number of runs in the file, and its path.

    Copied into the study's folder, a runs.jsonl stands for the run folders that are not there.
    Raises ValueError if `path` belongs to another study.
    """
    path = path if path.suffix else path / "runs.jsonl"
    if path.name != "runs.jsonl":
        raise ValueError(f"--archive is {path}; the file must be named runs.jsonl.")
    study = load_study(folder, unfinished=True, named=named, varied=varied)
    if path.with_name("study.yaml").is_file():
        _check_name(path.parent, study.name, "--archive")
    if path.is_file():
        study = _with_archived(study, folder, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In this order, since runs.jsonl without a study.yaml cannot be read.
    write_text(path.with_name("study.yaml"), study_text(study))
    write_text(path, "".join(row(run) + "\n" for run in study.runs))
    return len(study.runs), path


def _with_archived(study: Study, folder: Path, path: Path) -> Study:
    """The study with the runs of `path` that are not in `folder`."""
    if not path.with_name("study.yaml").is_file():
        raise ValueError(f"{path} is there, and no study.yaml; give another --archive.")
    archived = read_rows(path)
    if study.expected is None:  # whose arms are named by what differs between all of them
        here = {run.result["run_key"] for run in study.runs}
        kept = [(str(path), run) for run in archived if run.result["run_key"] not in here]
        before = read_study(path.with_name("study.yaml")).varied_keys
        varied = list(dict.fromkeys([*study.varied_keys, *before]))
        places = [*kept, *((f"{folder}/{n}", run) for n, run in enumerate(study.runs))]
        made = plain_study(study.name, places, [key for key in varied if key != "variant"])
        return dataclasses.replace(made, command=study.command, notes=study.notes)
    known = {identity(run) for run in study.runs}
    runs = [run for run in archived if identity(run) not in known] + list(study.runs)
    check_held(runs)
    return dataclasses.replace(study, runs=runs)


def _check_name(folder: Path, name: str, option: str) -> None:
    if (other := read_study(folder / "study.yaml").name) != name:
        raise ValueError(f"{folder} holds the study {other}, not {name}; give another {option}.")
