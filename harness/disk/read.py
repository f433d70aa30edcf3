"""Files of JSON and YAML as data: plain values of the kinds that a schema names.

Whatever a file holds, reading it calls nothing, resolves nothing and ends: what is damaged, or not
what it should be, is one ValueError that names the file, the line and the key. A schema is a
TypedDict, checked by pydantic without conversions: 1 is no text, "1" no number, true neither; keys
that it does not name may be there.

No torch: reports, launchers and sweeps read with this.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    NotRequired,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml
from typing_extensions import TypedDict

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")

DEEPEST = 64  # brackets within brackets; files of this project have some ten
LONGEST_INTEGER = 20  # digits, as many as 64 bits may have
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SHOWN = 60  # characters of a value in a sentence


# ---- from text ----------------------------------------------------------------------------------


def parse_json(text: str | bytes, where: str, *, nonfinite: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError, beginning with `where`, unless it is one, no
    deeper than `DEEPEST` and with numbers that a computer holds.

    Args:
        nonfinite: allow NaN and infinities, which JSON lacks.
    """
    try:
        value = json.loads(
            text,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=float if nonfinite else _no,
        )
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:  # of the text's encoding too
        raise ValueError(f"{where} is not valid JSON: {error}.") from None
    _check_depth(value, where)
    if _SURROGATE.search(text if isinstance(text, str) else text.decode("utf-8", "replace")):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where} has half of a surrogate pair.") from None
    return value


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > LONGEST_INTEGER:
        raise ValueError(f"it has a whole number of {len(text.lstrip('-'))} digits")
    return int(text)


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:_SHOWN]} is too large")
    return number


def _no(text: str) -> Any:
    raise ValueError(f"it has {text}, which is no number of JSON")


def _too_deep(where: str) -> ValueError:
    return ValueError(f"{where} nests more than {DEEPEST} brackets.")


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise _too_deep(where)


class _Loader(yaml.SafeLoader):
    """Without anchors: aliases of aliases make of a hundred bytes a billion values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "it has an alias", event.start_mark)
        return super().compose_node(parent, index)


# ---- from files ---------------------------------------------------------------------------------


def check_is_file(path: Path) -> None:
    """Raise ValueError unless there is a file that ends: no folder, pipe or device."""
    if not path.exists():
        raise ValueError(f"{path} is missing.")
    if not path.is_file():
        raise ValueError(f"{path} is no file.")


def _text(path: Path) -> str:
    check_is_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None


def read_json(path: Path, schema: type[T], *, nonfinite: bool = False) -> T:
    """The content of a JSON file. Raises ValueError naming the file unless it is of `schema`."""
    return check(schema, parse_json(_text(path), str(path), nonfinite=nonfinite), str(path))


def read_json_lines(path: Path, schema: type[T]) -> Iterator[tuple[int, T]]:
    """(line number, value) of a file with one JSON value a line; blank lines are passed over.
    Raises ValueError naming file and line unless each is of `schema`."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield number, check(schema, parse_json(line, where), where)


def read_yaml(path: Path, schema: type[T]) -> T:
    """The content of a YAML file. Raises ValueError naming the file unless it is of `schema`."""
    text = _text(path)
    try:
        value = yaml.load(text, _Loader)
    except RecursionError:
        raise _too_deep(str(path)) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of 5,000 digits, a date
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not valid YAML: {reason}.") from None
    except (KeyError, AttributeError, IndexError, TypeError):
        raise ValueError(f"{path} is not valid YAML: a tag does not fit its value.") from None
    _check_depth(value, str(path))
    return check(schema, value, str(path))


# ---- against a schema ---------------------------------------------------------------------------


@functools.cache
def _adapter(schema: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def check(schema: Any, value: Any, where: str, wanted: str = "") -> Any:
    """`value` itself. Raises ValueError, beginning with `where` and naming the key, unless it is of
    `schema`: a TypedDict, or any other annotation of plain values.

    Args:
        wanted: what the whole value must be, in words.
    """
    from pydantic import ValidationError

    try:
        _adapter(schema).validate_python(value, strict=True)
    except ValidationError as error:
        if wanted:
            raise ValueError(f"{where} is {value!r}; it must be {wanted}.") from None
        first = error.errors(include_url=False)[0]
        raise ValueError(_sentence(first, where)) from None
    return value


def schema_of(record: type, **kinds: Any) -> Any:
    """The schema of a file that holds a dataclass: its fields, as JSON has them; those with a
    default may be missing.

    Args:
        kinds: field -> its schema, where a file is held to more than the annotation says.
    """
    hints = get_type_hints(record)
    for field in dataclasses.fields(record):
        if field.default is not MISSING or field.default_factory is not MISSING:
            hints[field.name] = NotRequired[_as_in_json(hints[field.name])]
        else:
            hints[field.name] = _as_in_json(hints[field.name])
    return TypedDict(record.__name__, {**hints, **kinds})  # type: ignore[operator]


def _as_in_json(hint: Any) -> Any:
    """An annotation with list and dict for Sequence and Mapping."""
    origin, inner = get_origin(hint), tuple(map(_as_in_json, get_args(hint)))
    if origin in (Union, UnionType):
        return Union[inner]  # noqa: UP007 (of a tuple)
    plain: Any = {Sequence: list, Mapping: dict}.get(origin)
    return plain[inner] if plain else hint


_WORDS = (  # of pydantic, and ours
    ("Input should", "it must"), ("valid dictionary", "mapping"), ("a valid string", "text"),
    ("a valid integer", "a whole number"), ("a valid boolean", "true or false"), ("valid ", ""),
)  # fmt: skip


def _sentence(error: Any, where: str) -> str:
    path = [str(part) for part in error["loc"]]
    if path and path[-1] in ("str", "[key]"):  # pydantic's, of a union's member and of a key
        del path[-1]
    key = ".".join(path)
    if error["type"] == "missing":
        return f"{where} lacks {key}."
    wanted = error["msg"]
    for theirs, ours in _WORDS:
        wanted = wanted.replace(theirs, ours)
    subject = f"{where}: {key}" if key else where
    return f"{subject} is {shortened(error['input'])}; {wanted}."


def shortened(value: Any) -> str:
    """A value as a sentence shows it, however long it is."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
