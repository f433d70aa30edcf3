"""Text classification from the user's own files: JSON Lines, CSV or TSV, in UTF-8.

    python train.py task=local task.files.train=train.jsonl task.files.test=test.jsonl

The extension decides the format: .jsonl and .json hold one object a line; .csv and .tsv have a
header line, and quote a field as spreadsheets and pandas do. Blank lines are skipped. The labels
are those of the train file, strings or integers. Without a validation file, about a tenth of the
train rows is held out by the hash of their text; a test file is always needed, since what is
compared in the end must not be a matter of chance. A row's id is its line in its file.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from harness.spelling import did_you_mean
from harness.tasks.classification import (
    Row,
    TextClassification,
    check_labels,
    label_names,
)
from harness.tasks.rows import hold_out_validation

DELIMITERS = {".csv": ",", ".tsv": "\t"}
EXTENSIONS = (".jsonl", ".json", *DELIMITERS)


def read_rows(
    path: str | Path, *, text_field: str = "text", label_field: str = "label"
) -> list[Row]:
    """The rows of one file, ids being line numbers from 1.

    Raises ValueError, with the file and the line, on whatever is not such a row.
    """
    path = Path(path).expanduser()
    rows = []
    for line, record in read_records(path):
        where = f"{path}, line {line}"
        check_fields(record, (text_field, label_field), where, ("text_field", "label_field"))
        text = text_of(record, text_field, where)
        label = record[label_field]
        if not isinstance(label, str | int):
            raise ValueError(
                f"{where}: field {label_field!r} is {label!r}; a label is a string or an integer."
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
    return {split: Path(path).expanduser() for split, path in files.items() if path is not None}


def read_records(
    path: Path, extensions: Sequence[str] = EXTENSIONS
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line from 1, fields) of each row of a file, as its extension says how to read it.

    Raises ValueError if that is none of `extensions`, or the file is not well-formed.
    """
    if path.suffix.lower() not in extensions:
        raise ValueError(f"{path}: the extension must be one of {', '.join(extensions)}.")
    records = _csv_records if path.suffix.lower() in DELIMITERS else _json_records
    return records(path, read_text(path))


def check_fields(
    record: Iterable[str], fields: Sequence[str], where: str, settings: Sequence[str] = ()
) -> None:
    """Raise ValueError, with `where`, on the first of `fields` that a row has not.

    Args:
        settings: those of the task that name each of the fields.
    """
    for field, setting in zip_longest(fields, settings):
        if field not in record:
            named = f" task.{setting} names it." if setting else ""
            raise ValueError(
                f"{where}: no field {field!r} among {sorted(record)}."
                f"{named}{did_you_mean(field, record)}"
            )


def text_of(record: Mapping[str, Any], field: str, where: str) -> str:
    """What stands in a field that a row has. Raises ValueError, with `where`, unless it is text."""
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} is {text!r}, not a string.")
    if not text.strip():
        raise ValueError(f"{where}: field {field!r} is empty.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where}: field {field!r} has half of a surrogate pair.")
    return text


def read_text(path: Path) -> str:
    """The content of a file of UTF-8, without a byte order mark. Raises ValueError, with the line,
    if it is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8.") from error


def _json_records(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(), which would also cut at U+2028 and its like inside a string.
    for line, source in enumerate(content.split("\n"), start=1):
        if not source.strip():
            continue
        try:
            record = json.loads(source)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {line}: malformed JSON ({error.msg}); "
                "the file must hold one object a line."
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, line {line}: expected a JSON object, found {source[:40]!r}; "
                "the file must hold one object a line."
            )
        yield line, record


def _csv_records(path: Path, content: str) -> Iterator[tuple[int, dict[str, str]]]:
    delimiter = DELIMITERS[path.suffix.lower()]
    csv.field_size_limit(max(csv.field_size_limit(), len(content)))  # 131,072 as it comes
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    line, header = 1, None
    try:
        for fields in reader:
            if not fields:
                pass  # a blank line
            elif header is None:
                header = [name.strip() for name in fields]
            elif len(fields) != len(header):
                raise ValueError(
                    f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)}."
                )
            else:
                yield line, dict(zip(header, fields, strict=True))
            line = reader.line_num + 1  # where the next record starts: a field may hold newlines
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: malformed {path.suffix[1:]} ({error}).") from error


class LocalClassification(TextClassification):
    """`task=local`.

    Args:
        files: paths of train, test and, if there is one, validation; None counts as absent.
        text_field, label_field: the fields of a row, for all files.
        signal_rows, max_tokens: see `TextClassification`.

    Raises ValueError, with file and line, on anything that `read_rows` refuses, on a label that
    train does not have, and if train has fewer than two.
    """

    def __init__(
        self,
        files: Mapping[str, str | Path | None],
        *,
        text_field: str = "text",
        label_field: str = "label",
        signal_rows: int = 256,
        max_tokens: int = 64,
    ):
        paths = given_paths(files, "local")
        rows = {
            split: read_rows(path, text_field=text_field, label_field=label_field)
            for split, path in paths.items()
        }
        labels = label_names(rows["train"], str(paths["train"]))
        for split, path in paths.items():
            check_labels(rows[split], labels, f"{path}, line")
        notes = []
        if "validation" not in rows:
            rows["train"], rows["validation"] = hold_out_validation(
                rows["train"], str(paths["train"])
            )
            notes.append("validation was held out from the train file by the hash of the text")
        super().__init__(
            "local",
            rows,
            labels,
            signal_rows=signal_rows,
            max_tokens=max_tokens,
            notes=notes,
        )
