"""A study that nobody ran, as Run rows: seven arms, a tuning grid, paired seeds, and the accidents.

Per-item outcomes come from a latent ability (arm, rate, seed) against item difficulties that all
runs share, with a common noise per (seed, item), so that pairs correlate as real ones do. Every
number follows from `draw`.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from harness.compare.study import Run, Study
from harness.config.identity import control_hash, run_key
from harness.disk.digest import digest

LAYERS = [
    f"bert.encoder.layer.{index}.{part}" for index in range(3) for part in ("query", "value", "out")
]
FINGERPRINTS = {"data": "da" * 32, "base": "ba" * 32, "tokenizer": "70" * 32}
ENVIRONMENT = {
    "python": "3.11.7",
    "packages": {"torch": "2.13.0+cpu", "numpy": "2.4.6"},
    "platform": "Linux-6.18-x86_64",
    "processor": "AMD EPYC",
    "cores": 2,
    "threads": 1,
    "cpu_capability": "AVX2",
    "device": "cpu",
    "accelerator": None,
    "matmul_precision": "highest",
    "commit": "8fb788a2d2ebf5f5105c882b36859045a7707664",
    "uncommitted_changes": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeArm:
    """Describes an arm. `ability` is at its best rate; `width` is the standard deviation of the
    curve of ability over log10 rate; `end_rank` < 8 makes it prune."""

    ability: float
    best_rate: float
    yaml_rate: float
    width: float = 1.2
    scale: float | None = 2.0
    trainable: int = 338_690
    end_rank: int = 8
    step_s: float = 0.5
    base_bytes: int = 90_852_864
    peak_bytes: int = 315_000_000


ARMS = {
    "lora": MadeArm(ability=2.0, best_rate=2e-3, yaml_rate=2e-3),
    "lora_plus": MadeArm(ability=2.02, best_rate=5e-4, yaml_rate=3e-4, width=0.8),
    "adalora": MadeArm(ability=1.9, best_rate=3e-3, yaml_rate=2e-3, end_rank=5, step_s=0.47),
    "dora": MadeArm(
        ability=2.25, best_rate=2e-3, yaml_rate=2e-3, trainable=359_810, step_s=0.62,
        peak_bytes=408_000_000,
    ),
    "qlora": MadeArm(
        ability=2.0, best_rate=2e-3, yaml_rate=2e-3, step_s=0.9, base_bytes=53_370_000,
        peak_bytes=280_000_000,
    ),
    "full": MadeArm(
        ability=2.1, best_rate=1e-1, yaml_rate=1e-4, width=3.0, scale=None, trainable=10_800_000,
        step_s=0.95, base_bytes=47_700_000, peak_bytes=399_000_000,
    ),
    "head": MadeArm(
        ability=0.6, best_rate=2e-3, yaml_rate=2e-3, width=9.0, scale=None, trainable=770,
        step_s=0.3, peak_bytes=109_000_000,
    ),
}  # fmt: skip
MULTIPLIERS = (0.1, 0.31622776601683794, 1.0, 3.1622776601683795, 10.0)


def made_study(
    *,
    arms: tuple[str, ...] = tuple(ARMS),
    anchors: tuple[str, ...] = ("full", "head"),
    seeds: int = 8,
    tuning_seeds: int = 2,
    items: int = 500,
    steps: int = 200,
    diverged: bool = True,
    failed: bool = True,
    draw: int = 0,
) -> Study:
    """The whole study, with what it expects and what it chose.

    Args:
        arms: of ARMS, the first being the reference.
        anchors: those of them that are not in the Holm family.
        tuning_seeds: 0 for a study without tuning, at the YAML's rates.
        items: rows of test.
        diverged: the second arm's highest rate, and the last seed of its comparison, diverge.
        failed: the third arm's first comparison run ended in an error of the software.
    """
    rng = np.random.default_rng(draw)
    world = _World(rng, items, steps)
    tune_seeds, paired = range(100, 100 + tuning_seeds), range(1000, 1000 + seeds)
    runs: list[Run] = []
    chosen: dict[str, dict[str, Any]] = {}
    for name in arms:
        arm = ARMS[name]
        rates = [arm.yaml_rate * m for m in MULTIPLIERS] if tuning_seeds else []
        means: list[float] = []
        top = arm.yaml_rate * MULTIPLIERS[-1]
        for rate in rates:  # which grows by up to two where the best is at its upper edge
            broken = diverged and name == arms[min(1, len(arms) - 1)] and rate == top
            cell = [world.run(name, "tune", s, rate, diverged=broken) for s in tune_seeds]
            runs += cell
            means.append(np.mean([0.5 if broken else r.result["validation"]["accuracy"]
                                  for r in cell]))  # fmt: skip
            last = len(means) == len(rates) < len(MULTIPLIERS) + 2
            if last and max(means) == means[-1]:
                rates.append(rate * MULTIPLIERS[-2])
        best = int(np.argmax(means)) if means else 0
        rate = rates[best] if rates else arm.yaml_rate
        if rates:
            chosen[name] = {
                "chosen": {"variant.lr": rate},
                "rule": "argmax",
                "bracketed": 0 < best < len(rates) - 1,
                "grown": len(rates) - len(MULTIPLIERS),
                "gap": float(means[best] - sorted(means)[-2]),
            }
        for seed in paired:
            bad = diverged and len(arms) > 1 and name == arms[1] and seed == paired[-1]
            lost = failed and len(arms) > 2 and name == arms[2] and seed == paired[0]
            runs.append(world.run(name, "compare", seed, rate, diverged=bad, failed=lost))
    expected = [
        {"arm": r.arm, "phase": r.phase, "seed": r.seed, "tuned": dict(r.tuned), "run": folder(r)}
        for r in runs
    ]
    return Study(
        name="made",
        question="Does any of these beat plain LoRA on sentences that were never written?",
        command="python train.py -m experiment=made",
        commit=ENVIRONMENT["commit"],
        arms={name: [f"variant={name}"] for name in arms},
        reference=arms[0],
        primary=[name for name in arms[1:] if name not in anchors],
        free=[],
        tune={"variant.lr": {"multipliers": list(MULTIPLIERS)}} if tuning_seeds else {},
        tuning_seeds=list(tune_seeds),
        seeds=list(paired),
        chosen=chosen,
        expected=expected,
        runs=runs,
    )


class _World:
    """Items, their difficulty, and what a run on them gives."""

    def __init__(self, rng: np.random.Generator, items: int, steps: int):
        self.rng, self.items, self.steps = rng, items, steps
        self.difficulty = rng.normal(0, 1.5, items)
        self.luck: dict[int, tuple[float, np.ndarray]] = {}  # of a seed: common to its pair

    def run(
        self,
        name: str,
        phase: str,
        seed: int,
        rate: float,
        *,
        diverged: bool = False,
        failed: bool = False,
    ) -> Run:
        arm, rng = ARMS[name], self.rng
        if seed not in self.luck:
            self.luck[seed] = rng.normal(0, 0.04), rng.logistic(0, 1, self.items)
        shared, noise = self.luck[seed]
        off = math.log10(rate / arm.best_rate) / arm.width
        ability = arm.ability - off**2 + shared + rng.normal(0, 0.02)
        own = rng.logistic(0, 1, self.items)
        correct = ability - self.difficulty + 0.3 * noise + 0.2 * own > 0
        accuracy = float(correct.mean())
        validation = float(np.clip(accuracy + rng.normal(0, 0.008), 0, 1))
        config = _config(name, seed, rate, self.steps)
        ranks = [8] * len(LAYERS)
        history = [{"step": 0, "ranks": list(ranks)}]
        if arm.end_rank < 8:
            for step in range(15, self.steps, 15):
                ranks = [max(arm.end_rank + index % 3 - 1, r - (index + step) % 2)
                         for index, r in enumerate(ranks)]  # fmt: skip
                if ranks != history[-1]["ranks"]:
                    history.append({"step": step, "ranks": list(ranks)})
        result: dict[str, Any] = {
            "status": "complete",
            "variant": name,
            "seed": seed,
            "lr": rate,
            "steps": self.steps,
            "task": "movie_sentiment",
            "classes": 2,
            "base": "sentence-transformers/all-MiniLM-L6-v2",
            "run_key": run_key(config),
            "control_hash": control_hash(config, FINGERPRINTS),
            "fingerprints": FINGERPRINTS,
            "effective_scale": arm.scale,
            "parameters": {
                "trainable": arm.trainable,
                "trainable_final": int(arm.trainable * sum(ranks) / (8 * len(LAYERS))),
                "total": 22_713_986,
            },
            "environment_hash": digest(ENVIRONMENT),
        }
        stop = self.steps // 2 if diverged or failed else self.steps
        curve = self._curve(arm, accuracy, stop)
        row = {"arm": name, "phase": phase, "seed": seed, "tuned": {"variant.lr": rate}}
        row |= {"config": config, "environment": ENVIRONMENT, "curve": curve}
        if diverged or failed:
            result |= {
                "status": "failed",
                "failure": "NonFiniteLoss" if diverged else "BrokenLaw",
                "reason": f"training diverged at step {stop}: loss nan nats, gradient norm nan; a "
                "lower variant.lr may help."
                if diverged
                else "something wrote the frozen base during the run.",
            }
            return Run(**row, result=result, correct=None)
        step_s = arm.step_s * (1 + abs(float(rng.normal(0, 0.03))))
        final = {LAYERS[i]: ranks[i] for i in range(len(LAYERS))} if arm.scale else {}
        result |= {
            "base_fingerprint": {"before": "f0" * 32, "after": "f0" * 32},
            "merged_max_abs_diff": 1.1e-06,
            "validation": _scores(validation, 480),
            "test": _scores(accuracy, self.items),
            "active_rank": final,
            "rank_history": history if arm.scale else [{"step": 0, "ranks": []}],
            "time": {
                "train_s": step_s * self.steps * 1.02,
                "timed_steps": self.steps - 3,
                "step_median_s": step_s,
                "eval_s": 9.0,
                "tokens_per_s": 820 / step_s,
                "total_s": step_s * self.steps * 1.02 + 15,
            },
            "memory": {
                "train_peak_bytes": arm.peak_bytes,
                "resident_peak_bytes": 3 * arm.peak_bytes,
                "base_bytes": arm.base_bytes,
            },
            "adapter_bytes": 4 * arm.trainable + 6_000,
        }
        return Run(**row, result=result, correct="".join("1" if c else "0" for c in correct))

    def _curve(self, arm: MadeArm, accuracy: float, stop: int) -> list[dict[str, Any]]:
        rows = []
        for step in range(10, stop + 1, 10):
            done = 1 - math.exp(-4 * step / self.steps)
            row: dict[str, Any] = {
                "step": step,
                "train/loss_nats": 0.693 - 0.35 * done + float(self.rng.normal(0, 0.03)),
            }
            if arm.scale:
                row |= {"norm/A": 1.63 + 0.4 * done, "norm/B": 1.3 * done,
                        "norm/relative": 0.06 * done}  # fmt: skip
            if step % 50 == 0:
                score = 0.5 + (accuracy - 0.5) * done + float(self.rng.normal(0, 0.004))
                row |= {f"eval/{key}": value for key, value in _scores(score, 480).items()}
            rows.append(row)
        return rows


def _scores(accuracy: float, n: int) -> dict[str, Any]:
    loss = max(0.02, 0.70 - 0.8 * (accuracy - 0.5))
    return {"accuracy": accuracy, "macro_f1": accuracy - 3e-4, "loss_nats": loss, "n": n}


def _config(name: str, seed: int, rate: float, steps: int) -> dict[str, Any]:
    return {
        "variant": {"_target_": "variants.Variant", "name": name, "lr": rate},
        "model": {"_target_": "harness.models.minilm.load", "_partial_": True, "dtype": "float32"},
        "task": {"_target_": "harness.tasks.movie_sentiment.MovieSentiment", "max_tokens": 64},
        "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "fused": True},
        "schedule": {"_target_": "harness.loop.schedule.linear", "warmup_frac": 0.06},
        "tracking": {"_target_": "harness.tracking.NoTracker", "project": "lora-variants"},
        "seed": seed,
        "rank": 8,
        "alpha": 16,
        "targets": "all-linear",
        "groups": {"weight_decay": 0.01, "module_rates": {"head": 0.005}},
        "train": {
            "steps": steps,
            "batch_size": 32,
            "eval_every": 50,
            "log_every": 10,
            "checkpoint_every": 50,
            "device": "cpu",
            "threads": 1,
        },
        "force": False,
        "dry_run": False,
        "rate_test": False,
        "free": [],
    }


def rekeyed(run: Run, config: dict[str, Any]) -> Run:
    """The same run as that of another config."""
    result = {**run.result, "run_key": run_key(config), "seed": config["seed"]}
    result["variant"] = config["variant"]["name"]
    return dataclasses.replace(run, config=config, result=result)


def folder(run: Run) -> str:
    """The name that the run's folder would have."""
    return f"{run.result['variant']}-s{run.seed}-{run.result['run_key'][:8]}"


def write_run_folders(study: Study, outputs: Path) -> None:
    """The study's runs as train.py leaves them, without study.yaml. Norms are per layer there, and
    predictions hold validation before test."""
    for run in study.runs:
        path = outputs / folder(run)
        path.mkdir(parents=True, exist_ok=True)
        places = {"outputs_dir": str(outputs.parent), "run_dir": None}
        about = {"run_key": run.result["run_key"], "fingerprints": run.result["fingerprints"]}
        (path / "run.json").write_text(json.dumps({**about, "config": {**run.config, **places}}))
        (path / "environment.json").write_text(json.dumps(run.environment, indent=2))
        (path / "result.json").write_text(json.dumps(run.result, indent=2))
        with open(path / "metrics.jsonl", "w") as file:
            for row in run.curve:
                full: dict[str, Any] = {}
                for key, value in row.items():
                    names = [f"{key}/{layer}" for layer in LAYERS[:2]] if "norm/" in key else [key]
                    full |= dict.fromkeys(names, value)
                file.write(json.dumps({**full, "time/step_s": 0.5}) + "\n")
        if run.correct is not None:
            lines = [{"split": "validation", "row": i, "correct": i % 2 == 0, "loss_nats": 0.5}
                     for i in range(4)]  # fmt: skip
            lines += [{"split": "test", "row": 3 * i, "correct": c == "1", "loss_nats": 0.5}
                      for i, c in enumerate(run.correct)]  # fmt: skip
            (path / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
