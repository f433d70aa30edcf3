"""Tokenised splits on disk, so that the jobs of a sweep do not each tokenise the same text.

One safetensors file in `harness.disk.cache` for each key, which covers all that tokens depend on:
data, tokenizer, settings, length, code and versions.
"""

import hashlib
import json
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from harness.disk import cache, inputs
from harness.disk.digest import digest
from harness.disk.read import check, parse_json
from harness.models.fingerprint import tokenizer_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = dict[str, dict[str, list[list[int]]]]  # split -> input_ids, attention_mask ... -> rows
Counts = dict[str, dict[str, int]]  # what is counted, such as cut rows -> split -> rows
PACKAGES = ("transformers", "tokenizers", "jinja2")  # the last is of chat templates
VERSION = 2  # of how rows become tokens: what an earlier one has made is not read


def cache_key(fingerprint: str, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> str:
    """The key of the tokens of this data, cut at `max_tokens` by this tokenizer."""
    from harness.models.base import tokenizer_sha256

    return digest(
        {
            "version": VERSION,
            "data": fingerprint,
            "tokenizer": tokenizer_sha256(tokenizer),
            "settings": tokenizer_settings(tokenizer),
            "max_tokens": max_tokens,
            "code": inputs.code_of_readers(),
            "versions": {name: inputs.package_version(name) for name in PACKAGES},
        }
    )


def cache_file(key: str) -> Path:
    return cache.folder() / f"tokens-{key[:16]}.safetensors"


def _sha256(key: str, counts: str, tensors: Mapping[str, np.ndarray]) -> str:
    """Digests all that is kept: a file with a flipped bit is readable, and one may have the name
    of another."""
    found = hashlib.sha256(f"{key} {counts} ".encode())
    for name in sorted(tensors):
        found.update(f"{name} {len(tensors[name])} ".encode() + tensors[name].tobytes())
    return found.hexdigest()


def load(key: str) -> tuple[Tokens, Counts] | None:
    """(tokens, counts) as saved under this key, or None if there is no file that
    is undamaged and can be trusted."""
    if (content := cache.read(cache_file(key))) is None:
        return None
    tokens: Tokens = {}
    try:
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")], "the header")
        about, tensors = header["__metadata__"], load_tensors(content)
        if about["sha256"] != _sha256(key, about["counts"], tensors):
            return None
        for name in sorted(tensors):
            split, _, field = name.partition("/")
            if field == "lengths":
                continue
            values = tensors[name].tolist()
            ends = accumulate(tensors[f"{split}/lengths"].tolist(), initial=0)
            tokens.setdefault(split, {})[field] = [values[a:b] for a, b in pairwise(ends)]
        counts: Counts = check(Counts, parse_json(about["counts"], "counts"), "counts")
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None
    return tokens, counts


def save(key: str, tokens: Tokens, counts: Counts) -> None:
    """Write them, if that can be done."""
    tensors = {}
    for split, fields in tokens.items():
        rows = fields["input_ids"]
        tensors[f"{split}/lengths"] = np.array([len(row) for row in rows], dtype=np.int32)
        for field, values in fields.items():
            flat = [value for row in values for value in row]
            tensors[f"{split}/{field}"] = np.array(flat, dtype=np.int32)
    kept = json.dumps(counts)
    about = {"counts": kept, "sha256": _sha256(key, kept, tensors)}
    cache.write(cache_file(key), save_tensors(tensors, metadata=about))
