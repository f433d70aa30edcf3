"""Rebuilds the trained model of an adapter's folder, whoever has written it."""

import dataclasses
from pathlib import Path

from harness.adapter import imported, native
from harness.adapter.folders import adapter_folder
from harness.adapter.native import Restored, check_base, read_about, read_state
from harness.adapter.tensors import check_state
from harness.config import build
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
    layers = build.adapt(base, variant, config)
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
