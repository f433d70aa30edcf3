"""python -m harness.compare outputs/default [--out results/<study>]"""

import argparse
import json
import sys
from pathlib import Path

from harness.compare.load import load_runs
from harness.compare.table import markdown
from harness.run import write_atomic


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m harness.compare", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the runs are, at any depth")
    parser.add_argument("--out", type=Path, help="write table.md and runs.jsonl there")
    options = parser.parse_args(arguments)
    try:
        runs = load_runs(options.folder)
    except ValueError as error:
        sys.exit(f"error: {error}")
    table = markdown(runs)
    print(table, end="")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out / "table.md", table)
        rows = (json.dumps(run.result) + "\n" for run in runs)
        write_atomic(options.out / "runs.jsonl", "".join(rows))


if __name__ == "__main__":
    main()
