"""Rows of a file, as dictionaries with their line: JSON Lines, CSV or TSV, in UTF-8.

No torch: a mistake in a file is told before the seconds that importing it takes. Whatever a file
holds, what cannot be read is a ValueError with the file and the line, and nothing is taken for
something else: a key or a column that occurs twice is refused, since either could be meant.
"""

import csv
import io
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from harness.words import did_you_mean

DELIMITERS = {".csv": ",", ".tsv": "\t"}
EXTENSIONS = (".jsonl", ".json", *DELIMITERS)
MAX_DIGITS = 4300  # of a whole number, beyond which Python takes long
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def shown(value: Any) -> str:
    """A value for an error message, however long it is or deep."""
    return _SHORT.repr(value)


def _twice(names: Iterable[str]) -> str | None:
    """The first name that occurred before, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def parse_json(source: str) -> Any:
    """A JSON value. Raises ValueError, with a reason, on a key that occurs twice in an object, on
    brackets that are nested too deep and on a whole number that is too long; JSONDecodeError on
    text that is not JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if (twice := _twice(name for name, _ in pairs)) is not None:
            raise ValueError(f"the key {shown(twice)} occurs twice in an object")
        return dict(pairs)

    def whole(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"a whole number has {len(digits):,} digits")
        return int(digits)

    try:
        return json.loads(source, object_pairs_hook=unique, parse_int=whole)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None


def read_records(
    path: Path, extensions: Sequence[str] = EXTENSIONS, *, notes: list[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line from 1, fields) of each row of a file, as its extension says how to read it.

    Args:
        notes: where a sentence goes on what a reader should know of the file.

    Raises ValueError if that is none of `extensions`, or the file is not well-formed.
    """
    if path.suffix.lower() not in extensions:
        raise ValueError(f"{path}: the extension must be one of {', '.join(extensions)}.")
    if path.suffix.lower() in DELIMITERS:
        return _csv_records(path, read_text(path), [] if notes is None else notes)
    return _json_records(path, read_text(path))


def check_fields(
    record: Iterable[str], fields: Sequence[str], where: str, settings: Sequence[str] = ()
) -> None:
    """Raise ValueError, with `where`, on the first of `fields` that a row lacks.

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
    """The text of a row's field. Raises ValueError, with `where`, unless it is text."""
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} is {shown(text)}, not a string.")
    if not text.strip():
        raise ValueError(f"{where}: field {field!r} is empty.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where}: field {field!r} has half of a surrogate pair.")
    return text


def read_text(path: Path) -> str:
    """The content of a file of UTF-8, without a byte order mark. Raises ValueError, with the line,
    if it is not UTF-8."""
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
            record = parse_json(source)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {line}: malformed JSON ({error.msg}); "
                "the file must hold one object a line."
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}.") from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{path}, line {line}: expected a JSON object, found {source[:40]!r}; "
                "the file must hold one object a line."
            )
        yield line, record


def _csv_records(
    path: Path, content: str, notes: list[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    delimiter = DELIMITERS[path.suffix.lower()]
    csv.field_size_limit(max(csv.field_size_limit(), len(content)))  # 131,072 as it comes
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    line, header = 1, None
    joined = []  # lines where a record begins that has more than one
    try:
        for fields in reader:
            if not fields:
                pass  # a blank line
            elif header is None:
                header = [name.strip() for name in fields]
                if twice := _twice(name for name in header if name):
                    raise ValueError(
                        f"{path}, line {line}: the header has the column {twice!r} twice; rename "
                        "those that are not meant."
                    )
            elif len(fields) != len(header):
                raise ValueError(
                    f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)}."
                )
            else:
                yield line, dict(zip(header, fields, strict=True))
            if reader.line_num > line:
                joined.append(line)
            line = reader.line_num + 1  # where the next record starts: a field may hold newlines
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: malformed {path.suffix[1:]} ({error}).") from error
    if joined:
        notes.append(
            f"{len(joined):,} rows of {path.name} hold line breaks within quotes, the first from "
            f"line {joined[0]} on"
        )
