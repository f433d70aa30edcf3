"""Text classification from the user's own files: JSON Lines, CSV or TSV, in UTF-8.

    python train.py task=local task.files.train=train.jsonl task.files.test=test.jsonl

The extension decides the format: .jsonl and .json hold one object a line; .csv and .tsv have a
header line, and quote a field as spreadsheets and pandas do. Blank lines are skipped. The labels
are those of the train file, strings or integers. Without a validation file, about a tenth of the
train rows is held out by the hash of their text; a test file is always needed, since what is
compared in the end must not be a matter of chance. A row's id is its line in its file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.tasks.classification import Row, TextClassification, check_labels, label_names
from harness.tasks.files import check_fields, read_records, shown, text_of
from harness.tasks.rows import with_validation
from harness.words import did_you_mean
from variants.settings import check_text


def read_rows(
    path: str | Path,
    *,
    text_field: str = "text",
    label_field: str = "label",
    notes: list[str] | None = None,
) -> list[Row]:
    """The rows of one file, ids being line numbers from 1.

    Args:
        notes: where sentences go that a reader should know.

    Raises ValueError, with the file and the line, on whatever is not such a row.
    """
    path = Path(path).expanduser()
    rows = []
    for line, record in read_records(path, notes=notes):
        where = f"{path}, line {line}"
        check_fields(record, (text_field, label_field), where, ("text_field", "label_field"))
        text = text_of(record, text_field, where)
        label = record[label_field]
        if not isinstance(label, str | int):
            raise ValueError(
                f"{where}: field {label_field!r} is {shown(label)}; a label is a string or an "
                "integer."
            )
        label = label.strip() if isinstance(label, str) else json.dumps(label)
        if not label:
            raise ValueError(f"{where}: field {label_field!r} is empty.")
        rows.append(Row(line, text, label))
    if not rows:
        raise ValueError(f"{path}: no rows.")
    return rows


def given_paths(files: Mapping[str, str | Path | None], task: str) -> dict[str, Path]:
    """The files of `task` by split, without those that are None.

    Raises ValueError on another split than train, validation and test, and if there is no train or
    no test.
    """
    allowed = ("train", "validation", "test")
    for split in files:
        if split not in allowed:
            raise ValueError(
                f"task.files.{split}: no such split; there are {', '.join(allowed)}"
                f".{did_you_mean(split, allowed)}"
            )
    for split in ("train", "test"):
        if files.get(split) is None:
            raise ValueError(f"task={task} needs a {split} file: task.files.{split}=<path>.")
    given = {split: path for split, path in files.items() if path is not None}
    for split, path in given.items():
        if not isinstance(path, Path):
            check_text(f"task.files.{split}", path)
    return {split: Path(path).expanduser() for split, path in given.items()}


class LocalClassification(TextClassification):
    """`task=local`.

    Args:
        files: paths of train, test and, if there is one, validation; None counts as absent.
        text_field, label_field: the fields of a row, for all files.
        settings: see `TextClassification`.

    Raises ValueError, with file and line, on anything that `read_rows` refuses, on a label that
    train does not have, and if train has fewer than two.
    """

    def __init__(
        self,
        files: Mapping[str, str | Path | None],
        *,
        text_field: str = "text",
        label_field: str = "label",
        **settings: Any,
    ):
        paths = given_paths(files, "local")
        notes: list[str] = []
        rows = {
            split: read_rows(path, text_field=text_field, label_field=label_field, notes=notes)
            for split, path in paths.items()
        }
        labels = label_names(rows["train"], str(paths["train"]))
        for split, path in paths.items():
            check_labels(rows[split], labels, f"{path}, line")
        rows, note = with_validation(rows, str(paths["train"]))
        super().__init__("local", rows, labels, notes=[*notes, note], **settings)
