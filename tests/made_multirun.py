"""The runs of a multirun that nobody ran: swept keys, paired seeds, scores from a formula."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from made_study import FINGERPRINTS, made_study, rekeyed, write_run_folders

from harness.compare import multirun
from harness.compare.study import Run
from harness.config.identity import control_hash


def made_runs(
    swept: Mapping[str, Sequence[Any]],
    score: Callable[..., float],
    *,
    seeds: int = 3,
    noise: float = 0.01,
    base: str | None = None,
) -> list[Run]:
    """A run for each combination of the swept values and each seed.

    Args:
        score: of the values, by position; a seed adds what it adds to all of its runs, and `noise`
            times a normal number to each.
    """
    rng = np.random.default_rng(0)
    template = made_study(arms=("lora", "dora"), seeds=1, tuning_seeds=0, items=40, steps=100,
                          diverged=False, failed=False, anchors=())  # fmt: skip
    by_variant = {run.result["variant"]: run for run in template.runs}
    luck = rng.normal(0, 0.03, seeds)
    runs = []
    for values in product(*swept.values()):
        for seed in range(seeds):
            setting = dict(zip(swept, values, strict=True))
            made = by_variant[setting.get("variant", "lora")]
            config = json.loads(json.dumps(made.config)) | {"seed": seed, "run_dir": None}
            config["dropout"], config["outputs_dir"] = 0.0, "outputs"
            for key, value in setting.items():
                if key != "variant":
                    *parents, last = key.split(".")
                    node = config
                    for parent in parents:
                        node = node.setdefault(parent, {})
                    node[last] = value
            accuracy = float(np.clip(score(*values) + luck[seed] + rng.normal(0, noise), 0, 1))
            test = {**made.result["test"], "accuracy": accuracy}
            prints = {**FINGERPRINTS, **({"base": base} if base else {})}
            result = {**made.result, "test": test, "fingerprints": prints}
            result["control_hash"] = control_hash(config, prints)
            right = round(40 * accuracy)
            run = dataclasses.replace(
                made,
                seed=seed,
                result={**result, "test": {**test, "accuracy": accuracy}},
                correct="1" * right + "0" * (40 - right),
            )
            runs.append(rekeyed(run, config))
    return runs


def write_multirun(folder: Path, runs: Sequence[Run], keys: Sequence[str], **changes: Any) -> None:
    """The runs' folders, and the record that they were swept by these keys."""
    study = dataclasses.replace(made_study(seeds=1, tuning_seeds=0, items=4), runs=list(runs))
    write_run_folders(study, folder)
    members = [
        multirun.Member(
            values={
                key: run.config["variant"]["name"] if key == "variant" else _at(run.config, key)
                for key in keys
            },
            seed=run.seed,
            asked=multirun.asked(run.config),
            threads=run.config["train"]["threads"],
            device=run.config["train"]["device"],
        )
        for run in runs
    ]
    settings: dict[str, Any] = {
        "name": f"{'-'.join(keys)}-123456", "started": "2026-11-30T00:00:00", "keys": keys,
        "command": "python train.py -m ...", "members": members,
    }  # fmt: skip
    multirun.write(folder, multirun.Multirun(**{**settings, **changes}))


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config
