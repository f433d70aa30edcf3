"""Tokenised splits on disk, so that the jobs of a sweep do not each tokenise the same text.

One safetensors file per (data, tokenizer, length) in `harness.cache`.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from harness import cache
from harness.keys import digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = dict[str, dict[str, list[list[int]]]]  # split -> input_ids, attention_mask ... -> rows
Counts = dict[str, dict[str, int]]  # what is counted, such as cut rows -> split -> rows
VERSION = 2  # of how rows become tokens: what an earlier one has made is not read


def cache_file(fingerprint: str, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> Path:
    """Where the tokens of this data, cut at `max_tokens` by this tokenizer, belong."""
    from harness.models.base import tokenizer_sha256

    key = digest(
        {
            "version": VERSION,
            "data": fingerprint,
            "tokenizer": tokenizer_sha256(tokenizer),
            "sides": [tokenizer.truncation_side, tokenizer.model_input_names],
            "max_tokens": max_tokens,
            "versions": [version("transformers"), version("tokenizers")],
        }
    )
    return cache.folder() / f"tokens-{key[:16]}.safetensors"


def _sha256(tensors: Mapping[str, np.ndarray]) -> str:
    """Of names and values: a file with a flipped bit is readable."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {len(tensors[name])} ".encode() + tensors[name].tobytes())
    return found.hexdigest()


def load(file: Path) -> tuple[Tokens, Counts] | None:
    """(tokens, counts) as saved, or None if there is no undamaged file."""
    tokens: Tokens = {}
    try:
        with safe_open(file, framework="numpy") as saved:
            counts = json.loads(saved.metadata()["counts"])
            tensors = {name: saved.get_tensor(name) for name in sorted(saved.keys())}
            if saved.metadata()["sha256"] != _sha256(tensors):
                return None
            for name in tensors:
                split, _, field = name.partition("/")
                if field == "lengths":
                    continue
                values = tensors[name].tolist()
                ends = accumulate(tensors[f"{split}/lengths"].tolist(), initial=0)
                tokens.setdefault(split, {})[field] = [values[a:b] for a, b in pairwise(ends)]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    return tokens, counts


def save(file: Path, tokens: Tokens, counts: Counts) -> None:
    """Write them, if that can be done."""
    tensors = {}
    for split, fields in tokens.items():
        rows = fields["input_ids"]
        tensors[f"{split}/lengths"] = np.array([len(row) for row in rows], dtype=np.int32)
        for field, values in fields.items():
            flat = [value for row in values for value in row]
            tensors[f"{split}/{field}"] = np.array(flat, dtype=np.int32)
    metadata = {"counts": json.dumps(counts), "sha256": _sha256(tensors)}
    cache.write(file, lambda path: save_file(tensors, path, metadata=metadata))
