"""Digests of JSON values and of files: sha256 in hexadecimal digits."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A nested value of dicts and lists with each leaf changed."""
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [mapped(item, change) for item in value]
    return change(value)


def null_unless_finite(leaf: Any) -> Any:
    """None for what JSON lacks, NaN and infinities."""
    return None if isinstance(leaf, float) and not math.isfinite(leaf) else leaf


def digest(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys; 16 and 16.0 are one number, and what
    JSON lacks is null, as it is in an archive."""

    def canonical(leaf: Any) -> Any:
        leaf = null_unless_finite(leaf)
        return int(leaf) if isinstance(leaf, float) and leaf.is_integer() else leaf

    text = json.dumps(mapped(value, canonical), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
