"""Adapters on disk without training: every trained number is moved, so that nothing is at its zero
start."""

import json
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from harness.adapter import native
from harness.config import build
from harness.disk.write import new_folder

CONF = Path(__file__).parent.parent / "conf"
NAMES = sorted(file.stem for file in (CONF / "variant").glob("*.yaml"))


def checkpoint_state() -> dict:
    """The state of a checkpoint, but for what is of one step, as a run keeps it."""
    environment = {"packages": {}, "platform": "Linux-with-glibc2.31"}
    return {
        "sessions": [{"after_step": 0, "environment": environment, "code": {}}],
        "rank_history": [{"step": 0, "ranks": [8]}],
        "skipped": [1],
        "fingerprint_before": "x",
        "meter": {
            "step_s": [0.5],
            "step_tokens": [20],
            "eval_s": 0.0,
            "optimizer_s": 0.0,
            "outside_s": 0.0,
            "profiled_peak_bytes": None,
            "peak_shape": None,
        },
        "hooks": {"a hook": 2},
        "allocator": None,
    }


def config_of(*overrides: str) -> dict:
    """The config of a run, resolved as train.py resolves it."""
    held = ("model=tiny", "tracking=none", "train.threads=1", "train.device=cpu")
    given = {override.partition("=")[0] for override in overrides}
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        defaults = [key for key in held if key.partition("=")[0] not in given]
        return OmegaConf.to_container(compose("config", [*defaults, *overrides]), resolve=True)


def write_language_task(folder: Path) -> list[str]:
    """Sums as prompts and completions; returns the overrides that choose them and a model."""
    overrides = ["model=tiny_llama", "task=local_sft", "task.max_new_tokens=6",
                 "task.held_out_tokens=64"]  # fmt: skip
    for split, count in (("train", 40), ("validation", 6), ("test", 7)):
        path = folder / f"{split}.jsonl"
        rows = [{"prompt": f"{split} {i} + {i}", "completion": f"{2 * i}."} for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        overrides.append(f"task.files.{split}={path}")
    return overrides


@torch.no_grad()
def write_adapter(run: Path, *overrides: str, size: float = 0.1) -> Path:
    """`run`, holding an adapter whose trained parameters are N(0, size^2) from where they start.

    Raises ValueError where the variant does not fit the model.
    """
    config = config_of(*overrides)
    task = build.make(config, "task")
    base = build.load_base(config, task.labels)
    fingerprints = {"data": task.fingerprint, **base.fingerprints}
    layers = build.adapt(base, build.make_variant(config), config)
    generator = torch.Generator().manual_seed(7)
    for parameter in base.model.parameters():
        if parameter.requires_grad:
            parameter += size * torch.randn(parameter.shape, generator=generator)
    about = {
        "base": base.name,
        "fingerprints": fingerprints,
        "labels": task.labels and list(task.labels),
        "config": config,
    }
    with new_folder(run / "adapter") as out:
        native.write(out, model=base.model, layers=layers, about=about)
    return run
