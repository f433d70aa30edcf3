"""Rebuilds the trained model of an adapter's folder, whoever has written it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from harness.adapter import imported, native
from harness.adapter.folders import adapter_folder
from harness.adapter.native import Restored, check_base, read_about, read_state
from harness.adapter.tensors import check_state
from harness.config import build
from harness.models import passes
from harness.models.base import BaseModel
from variants.site import sites
from variants.state import load_trained_state, trained_state
from variants.store import DenseStore


def restore(path: Path, *, dense: bool = False, force: bool = False) -> Restored:
    """The trained model of a run, from its adapter and the base named there; on the CPU.

    Args:
        path: the run's folder, its adapter's, or that of an adapter that PEFT has saved.
        dense: keep the base weights as they were loaded, and not in the variant's store.
        force: take another base than the adapter was trained on, if the shapes allow it.

    Raises ValueError if a file is damaged, the base is not the same one, or they do not fit.
    """
    folder = adapter_folder(path)
    if not (folder / native.ABOUT).is_file():
        return imported.restore(folder)
    about = read_about(folder)
    state = read_state(folder, about)
    config = about["config"]
    labels = None if about["labels"] is None else tuple(about["labels"])
    build.check_recorded(config, ("model", "variant"), str(folder / native.ABOUT))
    base = build.load_base(config, labels)
    notes = check_base(base, about["fingerprints"], about["base"], force=force)
    variant = build.make_variant(config)
    if dense:
        variant = dataclasses.replace(variant, store=DenseStore)
    layers = build.adapt(base, variant, config, _passed(base, config, state))
    check_state(folder / native.TENSORS, state, trained_state(base.model, layers))
    load_trained_state(base.model, layers, state)
    base.model.eval()
    return Restored(
        folder=folder,
        base=base,
        variant=variant,
        layers=layers,
        labels=labels,
        config=config,
        fingerprints=about["fingerprints"],
        notes=notes,
    )


def _passed(
    base: BaseModel, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> passes.Passed | None:
    """The parameters that a text passes through, without the experts and projections of
    nn.MultiheadAttention that `all-linear` did not mean when the adapter was trained."""
    if "partial" not in config:  # of an adapter made elsewhere, or before there was one
        return None
    passed = passes.through(base.model, base.head)
    held: set[str] = set()
    later: set[str] = set()
    for site in sites(base.model).values():
        if site.kind in ("expert", "attention"):
            trained = any(key.startswith(f"{site.path}.") for key in state)
            (held if trained else later).add(site.parameter)
    return dataclasses.replace(passed, parameters=passed.parameters - (later - held))
