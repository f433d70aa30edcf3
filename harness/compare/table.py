"""Finished runs as a Markdown table, one line a run."""

from collections.abc import Sequence

from harness.banner import count, size
from harness.compare.load import Run

COLUMNS = (
    "variant", "seed", "rate", "s", "test accuracy", "macro F1", "loss (nats)", "n",
    "trained", "in use at the end", "base", "step (median)", "peak",
)  # fmt: skip


def markdown(runs: Sequence[Run]) -> str:
    """The table, with what it can and cannot say under it."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for run in runs:
        lines.append("| " + " | ".join(cells(run)) + " |")
    seeds = {run.result["seed"] for run in runs}
    if len(seeds) == 1:
        lines += [
            "",
            "One seed each: no interval, so no claim that one variant is better than another.",
        ]
    return "\n".join(lines) + "\n"


def cells(run: Run) -> list[str]:
    r = run.result
    if r["status"] != "complete":
        known = [f"{r['variant']} ({r['status']})", str(r["seed"]), f"{r['lr']:g}"]
        return known + [""] * (len(COLUMNS) - len(known))
    scale = r["effective_scale"]
    return [
        r["variant"],
        str(r["seed"]),
        f"{r['lr']:g}",
        "by layer" if isinstance(scale, dict) else "" if scale is None else f"{scale:g}",
        f"{r['test']['accuracy']:.4f}",
        f"{r['test']['macro_f1']:.4f}",
        f"{r['test']['loss_nats']:.4f}",
        str(r["test"]["n"]),
        count(r["parameters"]["trainable"]),
        count(r["parameters"]["trainable_final"]),
        size(r["memory"]["base_bytes"]),
        f"{1000 * r['time']['step_median_s']:.0f} ms" if r["time"]["step_median_s"] else "",
        size(r["memory"]["train_peak_bytes"]),
    ]
