"""A run's adapter on disk, in this project's own format: exactly what training needs to go on.

    native.json          which base, which variant, which labels, and the digest of the other file
    native.safetensors   all that was trained, and the layers' statistics

Beside them lies the same adapter in PEFT's format wherever that can hold it (peft_format.py).
A folder is written whole or not at all, and read whole or not at all.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from harness.adapter.about import About
from harness.adapter.folders import NATIVE
from harness.adapter.tensors import read_tensors
from harness.disk import digest
from harness.disk.digest import file_sha256
from harness.disk.read import check, read_json, shortened
from harness.models.base import BaseModel
from variants import AdapterLinear, Variant
from variants.state import trained_state

FORMAT = 1
ABOUT, TENSORS = NATIVE


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A trained model, rebuilt from its base and its adapter.

    Args:
        folder: of the adapter.
        base: `base.model` is the adapted model, in evaluation mode.
        layers: its adapted layers by path.
        labels: of the classifier; None of a language model.
        config: the run's; of an adapter made elsewhere, what `build` needs of one.
        fingerprints: of data, base and tokenizer, as the run recorded them; empty if it did not.
        notes: sentences that a user should know.
    """

    folder: Path
    base: BaseModel
    variant: Variant
    layers: Mapping[str, AdapterLinear]
    labels: tuple[str, ...] | None
    config: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> nn.Module:
        return self.base.model


def write(
    folder: Path,
    *,
    model: nn.Module,
    layers: Mapping[str, AdapterLinear],
    about: Mapping[str, Any],
) -> None:
    """Write both files into an existing folder.

    Args:
        about: base, fingerprints, labels and config, as `restore` reads them.
    """
    save_file(trained_state(model, layers), folder / TENSORS)
    content = {"format": FORMAT, **about, "tensors_sha256": file_sha256(folder / TENSORS)}
    text = json.dumps({**content, "sha256": digest.digest(content)}, indent=2)
    (folder / ABOUT).write_text(text + "\n", encoding="utf-8")


def read_about(folder: Path) -> dict[str, Any]:
    """native.json, whole. Raises ValueError if it is damaged or of another version."""
    path = folder / ABOUT
    content = read_json(path, dict[str, Any])
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {shortened(content.get('format'))}; this version reads {FORMAT}."
        )
    signed = {key: value for key, value in content.items() if key != "sha256"}
    if content.get("sha256") != digest.digest(signed):
        raise ValueError(f"{path} is damaged or was edited: its digest does not fit its content.")
    check(About, content, str(path))
    return content


def read_state(folder: Path, about: Mapping[str, Any]) -> dict[str, Tensor]:
    """native.safetensors, whole. Raises ValueError if it is not what native.json describes."""
    path = folder / TENSORS
    tensors = read_tensors(path)
    if file_sha256(path) != about["tensors_sha256"]:
        raise ValueError(f"{path} is damaged: its sha256 is not the one in {ABOUT}.")
    return tensors


def differing(base: BaseModel, fingerprints: Mapping[str, str]) -> str:
    """The parts of a base that are not as recorded: "the base and the tokenizer of", or nothing. An
    adapter of before functions were recorded has none to compare; see `check_base`."""
    found = base.fingerprints
    if "function" not in fingerprints:
        del found["function"]
    differ = [part for part, sha256 in found.items() if sha256 != fingerprints[part]]
    return f"the {' and the '.join(differ)} of" if differ else ""


def check_base(
    base: BaseModel, fingerprints: Mapping[str, str], name: str, *, force: bool
) -> tuple[str, ...]:
    """Notes on a base that differs from the recorded one; ValueError unless `force`d."""
    if not (differ := differing(base, fingerprints)):
        if "function" in fingerprints:
            return ()
        return (
            f"The adapter is of before a base's configuration was recorded: of {name}, its tensors "
            "and its tokenizer alone are checked.",
        )
    what = f"{differ} {base.name} differ from those of {name}"
    if not force:
        raise ValueError(
            f"{what}, which the adapter was trained on; --force takes them all the same."
        )
    return (f"Forced: {what}.",)
