"""Digests of JSON values and of files: sha256 in hexadecimal digits."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys; 16 and 16.0 are one number, and what
    JSON lacks (NaN, infinities) is null, as it is in an archive."""

    def canonical(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: canonical(item) for key, item in node.items()}
        if isinstance(node, list | tuple):
            return [canonical(item) for item in node]
        if isinstance(node, float) and not math.isfinite(node):
            return None
        return int(node) if isinstance(node, float) and node.is_integer() else node

    return hashlib.sha256(json.dumps(canonical(value), sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
