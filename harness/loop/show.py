"""The lines that a run prints: at its start the method under test, at its end the scores."""

import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from harness.config.build import UnderTest
from harness.config.settings import Settings
from harness.loop import facts
from harness.loop.meter import Meter
from harness.loop.step import StepResult
from harness.machine import distributed
from harness.models.base import BaseModel
from harness.tasks.base import Task
from harness.words import count, kind_of, size
from variants.layer import AdapterLinear, LowRankLinear
from variants.method import Variant

TITLES = {"loss_nats": "loss (nats)", "macro_f1": "macro F1"}


def parameters(counts: Mapping[str, int]) -> str:
    """Says how many parameters are trained, of how many."""
    trainable, total = counts["trainable"], counts["total"]
    share = 100 * trainable / total
    return f"trainable {trainable:,} of {total:,} parameters ({share:.2f} %)"


def coverage(found: Mapping[str, Any]) -> str:
    """Says how much of the matrix weights is adapted, and which large part is not."""
    total = max(1, found["total"])
    text = f"adapted {found['adapted']:,} of {found['total']:,} matrix weights"
    left = [f"{kind} {n / total:.0%}" for kind, n in found["left_out"].items() if n >= total / 100]
    share = f"{text} ({100 * found['adapted'] / total:.3g} %)"
    return share + (f"; not {', '.join(left)}" if left else "")


def lowered(layers: Mapping[str, AdapterLinear], variant: Variant) -> list[str]:
    """A sentence for each kind of layer that is narrower than the rank that was asked for."""
    rank = getattr(variant.adapter, "keywords", {}).get("rank", 0)
    narrow = {
        kind_of(path): (layer.active_rank(), f"{layer.out_features} x {layer.in_features}")
        for path, layer in layers.items()
        if isinstance(layer, LowRankLinear) and layer.active_rank() == min(layer.store.shape) < rank
    }
    return [
        f"{kind} is {shape}: its rank is {k}, not {rank}." for kind, (k, shape) in narrow.items()
    ]


def banner(
    settings: Settings, base: BaseModel, task: Task, test: UnderTest, notes: Sequence[str]
) -> str:
    """The method under test, as it stands before the first step.

    Args:
        notes: further sentences that a user should know.
    """
    counts = facts.parameters(test.model, test.layers, test.parameters)
    frozen = facts.frozen_bytes(test.model)
    notes = [
        *settings.notes, *base.notes, *lowered(test.layers, test.variant), *notes, *test.notes
    ]  # fmt: skip
    return "\n".join(
        [
            f"{test.variant.name} on {base.name}, seed {settings.seed}",
            task.describe(),
            *notes,
            f"\n{layer_table(test.layers)}\n\n{group_table(test.groups)}\n",
            f"{parameters(counts)}, frozen base {size(frozen)}",
            f"{coverage(test.coverage)}\n",
        ]
    )


def bar(start: int, steps: int) -> "tqdm[int]":
    """The steps after `start`, with a progress bar on a terminal."""
    return tqdm(
        range(start + 1, steps + 1),
        initial=start,
        total=steps,
        disable=not (sys.stderr.isatty() and distributed.is_first()),
        unit="step",
    )


def progress(now: StepResult, lr: float, gauge: Meter) -> str:
    """The text after the progress bar."""
    tokens_per_s = gauge.times()["tokens_per_s"] or 0.0
    peak = size(gauge.memory()["train_peak_bytes"])
    return f"loss {now.loss_nats:.3f}, rate {lr:.1e}, {tokens_per_s:.0f} tokens/s, peak {peak}"


def layer_table(layers: Mapping[str, AdapterLinear]) -> str:
    """Name, shape, rank and scale; layers of a stack that are alike share a line."""

    rows = []
    for path, layer in layers.items():
        shape = f"{layer.out_features} x {layer.in_features}"
        scale = "" if layer.scale is None else f"{layer.scale:g}"
        rows.append((kind_of(path), shape, layer.active_rank(), scale))
    order = {row: index for index, row in reversed(list(enumerate(rows)))}
    rows.sort(key=order.__getitem__)
    merged = [(*row, len(list(same))) for row, same in groupby(rows)]
    width = max(len(row[0]) for row in merged)
    lines = [f"{'layer':<{width}}  {'n':>3}  {'o x i':>12}  {'rank':>5}  {'scale':>6}"]
    for name, shape, rank, scale, n in merged:
        lines.append(f"{name:<{width}}  {n:>3}  {shape:>12}  {rank:>5}  {scale:>6}")
    return "\n".join(lines)


def end(result: Mapping[str, Any], folder: Path, where: str | None) -> str:
    """A run that has just been finished, and the places where it is kept."""
    kept = f"in {folder}: result.json, metrics.jsonl, predictions.jsonl, adapter/"
    return f"{result_table(result)}\n\n{kept}" + (f"\nW&B: {where}" if where else "")


def result_table(result: Mapping[str, Any]) -> str:
    """A finished run in a few lines."""
    if result["status"] != "complete":
        return f"{result['variant']} seed {result['seed']}: {result['status']}: {result['reason']}"
    splits = {split: result[split] for split in ("validation", "test") if result[split]}
    names = [name for name in next(iter(splits.values())) if name != "n"]
    titles = [TITLES.get(name, name.replace("_", " ")) for name in names]
    lines = [f"{'':<12}{'n':>6}" + "".join(f"  {title:>8}" for title in titles)]
    for split, metrics in splits.items():
        values = (metrics[name] for name in names)
        texts = [str(value) if isinstance(value, int) else f"{value:.4f}" for value in values]
        cells = [
            f"  {text:>{max(8, len(title))}}" for text, title in zip(texts, titles, strict=True)
        ]
        lines.append(f"{split:<12}{metrics['n']:>6}{''.join(cells)}")
    time, memory, parameters = result["time"], result["memory"], result["parameters"]
    step = time["step_median_s"]
    peak = size(memory["train_peak_bytes"])
    if (expected := memory.get("estimated_peak_bytes")) is not None:
        peak += f" (estimated {size(expected)})"
    if skipped := result.get("skipped_steps"):
        lines += ["", f"skipped       {skipped} of {result['steps']} steps, not finite"]
    if overflowed := result.get("overflowed_steps"):
        lines += ["", f"overflowed    {overflowed} of {result['steps']} steps, in float16"]
    lines += [
        "",
        f"trained       {count(parameters['trainable'])} of {count(parameters['total'])} parameters"
        f" ({count(parameters['trainable_final'])} in use at the end)",
        f"step          {f'{1000 * step:.0f} ms' if step else '?'} (median), peak {peak}",
        f"merged model  within {result['merged_max_abs_diff']:.1e} of the unmerged logits",
    ]
    return "\n".join(lines)


def group_table(groups: list[dict]) -> str:
    """The groups as a table: role, tensors, parameters, rate and decay."""
    lines = [f"{'role':<12}{'tensors':>8}{'parameters':>12}{'rate':>11}{'decay':>8}"]
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"{group['name']:<12}{len(group['params']):>8}{count:>12,}"
            f"{group['lr']:>11.3g}{group['weight_decay']:>8.3g}"
        )
    return "\n".join(lines)
