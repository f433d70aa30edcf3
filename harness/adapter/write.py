"""Writes what a run has trained, in each format that can hold it."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.adapter import native, peft_format
from harness.disk.write import new_folder
from harness.loop.facts import Held
from variants.layer import AdapterLinear


def write_adapter(
    out: Path,
    held: Held,
    layers: Mapping[str, AdapterLinear],
    config: Mapping[str, Any],
) -> int:
    """Write what was trained into the folder `out`, for PEFT too if it is low-rank; the bytes of
    its tensors."""
    base, labels = held.base, held.task.labels
    about = {
        "base": base.name,
        "fingerprints": held.identity.fingerprints,
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
