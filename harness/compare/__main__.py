"""Compares finished runs: a table for a terminal, a report in a folder or in Weights & Biases.

python -m harness.compare outputs/<experiment> [--out results/<study>]
python -m harness.compare outputs/<experiment> --wandb [entity/project]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import cli
from harness.compare import multirun, plan, table
from harness.compare.analyse import analysed, pooled
from harness.compare.load import load_study
from harness.compare.plain import ALL, taken
from harness.compare.report import archive, write
from harness.disk.write import write_text


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A user's mistake ends it with one sentence and exit code 1."""
    parser = cli.parser("harness.compare", __doc__)
    add = parser.add_argument
    add("folder", type=cli.path, nargs="+",
        help="outputs/<experiment> or results/<study>, or several")  # fmt: skip
    add("--out", type=cli.path, help="write the report there")
    add("--reference", help="the arm that the others are compared with")
    add("--metric", help="the metric to compare by, if nothing was tuned; default: the study's own")
    add("--plan", action="store_true", help="seeds that a difference needs at the noise seen")
    add("--difference", type=float, help="for --plan, in the metric's unit (0.01 is a point)")
    add("--multirun", metavar="NAME", help="one of several multiruns in the folder, or all runs; "
        "default: the last that varied anything")  # fmt: skip
    add("--varied", metavar="KEY[,KEY]", type=lambda text: text.split(","), default=[],
        help="the keys that runs differ in, where no record of a multirun says it")  # fmt: skip
    add("--archive", type=cli.path, help="add what is finished to this runs.jsonl")
    add("--wandb", nargs="?", const="", metavar="ENTITY/PROJECT",
        help="send what the W&B server lacks, save report and workspace, print their links",
    )  # fmt: skip
    add("--wandb-draft", action="store_true", help="the same; the report stays private")
    options = parser.parse_args(arguments)
    if options.wandb_draft and options.wandb is None:
        options.wandb = ""
    if options.difference is not None and not options.plan:
        parser.error("--difference belongs to --plan")
    if options.plan and options.out:
        parser.error("--plan writes nothing; leave --out out")
    if options.archive and (options.out or options.plan or options.reference or options.metric):
        parser.error("--archive stands alone: it keeps the runs, whatever is made of them")
    if options.multirun and options.varied:
        parser.error("a multirun's record says what it varied; leave --varied or --multirun out")
    if options.wandb is not None and (options.archive or options.plan):
        parser.error("--wandb sends a comparison; --archive and --plan make none")
    if options.archive and len(options.folder) > 1:
        parser.error("--archive takes one folder")
    try:
        cli.run(_run, options)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


def _run(options: argparse.Namespace) -> None:
    if options.archive:
        number, path = archive(
            options.folder[0], options.archive, named=options.multirun, varied=options.varied
        )
        print(f"{path} holds {number} runs")
        return
    studies = [
        load_study(
            folder,
            reference=options.reference,
            metric=options.metric,
            named=options.multirun,
            varied=options.varied,
        )
        for folder in options.folder
    ]
    if len({study.name for study in studies}) < len(studies):
        raise ValueError("two of the folders hold studies of one name; they would be one report.")
    analyses = [analysed(study) for study in studies]
    for folder, analysis in zip(options.folder, analyses, strict=True):
        if options.plan:
            print(plan.text(analysis, options.difference))
            continue
        print(table.summary(analysis))
        print(_other_multiruns(folder, ALL if options.varied else options.multirun), end="")
        if options.out:
            several = len(analyses) > 1
            out = options.out / analysis.study.name if several else options.out
            write(analysis, out)
            print(f"wrote {out / 'page.html'}")
        if options.wandb is not None:
            from harness.compare import wandb_study

            wandb_study.send(analysis, folder, options.wandb, draft=options.wandb_draft)
    if len(analyses) > 1 and not options.plan:
        text = table.pooled_text(analyses, *pooled(analyses))
        print(text)
        if options.out:
            write_text(options.out / "pooled.md", text)


def _other_multiruns(folder: Path, named: str | None) -> str:
    """Lines that name the multiruns of the folder, where there are several."""
    records = multirun.read_all(folder)
    if len(records) < 2:
        return ""
    this = taken(folder, named)
    lines = [f"{len(records)} multiruns in {folder}; --multirun NAME takes another, or all runs:"]
    for record in reversed(records):
        lines.append(f"  {record.describe()}{' (this one)' * (record.name == this)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
