"""Writes what a run has trained, in each format that can hold it."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.adapter import native, peft_format
from harness.disk.write import new_folder
from harness.models.base import BaseModel
from variants.base import AdapterLinear


def write_adapter(
    out: Path,
    base: BaseModel,
    layers: Mapping[str, AdapterLinear],
    labels: Sequence[str] | None,
    fingerprints: Mapping[str, str],
    config: Mapping[str, Any],
) -> int:
    """Write what was trained into the folder `out`, for PEFT too if it is low-rank; the bytes of
    its tensors."""
    about = {
        "base": base.name,
        "fingerprints": fingerprints,
        "labels": labels and list(labels),
        "config": config,
    }
    with new_folder(out) as folder:
        native.write(folder, model=base.model, layers=layers, about=about)
        with contextlib.suppress(peft_format.NotLowRank):
            peft_format.write(
                folder,
                model=base.model,
                layers=layers,
                base=base.name,
                config=config,
                head=base.head,
            )
    return (out / native.TENSORS).stat().st_size
