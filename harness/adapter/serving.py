"""The speed of a trained adapter's answers, in each way of serving it.

    base        the base model with a head and no adapter
    unmerged    the adapter's factors over the frozen weights
    merged      ordinary linear layers, as `python -m harness.adapter.export --merged` writes them
    4 bits      the adapter over frozen weights kept in 4 bits

All answer the same texts, tokenised beforehand: one of them alone (latency), and a batch of all
(throughput). Each round times every way once and begins one way later than the last. A ratio is the
median over rounds of the ratios within a round, with a 95 % interval (none below 6 rounds).
"""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.adapter import inference, merged
from harness.adapter.native import Restored
from harness.adapter.restore import restore
from harness.config import build
from harness.machine import hardware
from harness.machine.timing import WARMUP_ROUNDS, interleaved, median_interval
from harness.models.base import STORAGE_DTYPES
from harness.models.mode import evaluating
from harness.models.streamed import read_rest
from variants.state import load_trained_state, trained_state

ROUNDS = 15
BASE, QUANTISED = "base", "4 bits"
STORE = "nf4"  # of those in merged.STORES


def ways(path: Path, restored: Restored, *, force: bool) -> dict[str, nn.Module]:
    """The models to time, by name, on the CPU.

    Args:
        restored: over dense weights.

    There are no 4 bits where the variant trains the weights themselves.
    """
    config = restored.config
    dtype = STORAGE_DTYPES[config["model"].get("dtype", "float32")]
    base = build.load_base(config, restored.labels)
    read_rest(base.model)
    found: dict[str, nn.Module] = {
        BASE: base.model.requires_grad_(False),
        "unmerged": restored.model,
        "merged": merged.merge_into_base(copy.deepcopy(restored.base.model), dtype),
    }
    trained = restore(path, force=force)
    in_stores = merged.is_quantised(trained.variant) or trained.base.quantised
    quantised = trained if in_stores else over_store(restored, STORE)
    if any(layer.store is not None for layer in quantised.layers.values()):
        found[QUANTISED] = quantised.model
    return found


def over_store(restored: Restored, store: str) -> Restored:
    """The same adapter over frozen weights that are kept otherwise; see merged.STORES."""
    base = build.load_base(restored.config, restored.labels)
    variant = dataclasses.replace(restored.variant, store=merged.STORES[store])
    layers = build.adapt(base, variant, restored.config)
    state = trained_state(restored.base.model, restored.layers)
    load_trained_state(base.model, layers, state)
    base.model.eval()
    return dataclasses.replace(restored, base=base, variant=variant, layers=layers)


def answering(
    model: nn.Module, one: dict[str, Tensor], batch: dict[str, Tensor], device: torch.device
) -> Callable[[int], tuple[float, float]]:
    """Answers one text, then the batch, and returns the seconds of each."""

    def seconds(inputs: dict[str, Tensor]) -> float:
        start = time.perf_counter()
        model(**inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def step(number: int) -> tuple[float, float]:
        with evaluating(model):
            return seconds(one), seconds(batch)

    return step


def benchmark(
    path: Path,
    texts: Sequence[str] | None,
    *,
    batch_size: int,
    rounds: int,
    threads: int | None,
    device: Callable[[Restored], torch.device],
    force: bool = False,
) -> None:
    """Measure and print.

    Args:
        path: the run's folder, or its adapter's.
        texts: the first `batch_size` are answered; None for rows of the run's task.
        device: where, once the model is known.
    """
    torch.set_num_threads(threads or hardware.default_threads())
    restored = restore(path, dense=True, force=force)
    if texts is None:
        texts, _ = inference.sample_texts(restored, batch_size)
    texts = texts[:batch_size]
    if not texts:
        raise ValueError("there is no text to answer.")
    place = device(restored)
    limit, tokenizer = inference.token_limit(restored), restored.base.tokenizer
    read_as = inference.reads_control_tokens(restored)
    batch, lengths = inference.tokenize(tokenizer, texts, limit, control_tokens=read_as)
    typical = int(lengths.argsort()[len(texts) // 2])
    one, _ = inference.tokenize(tokenizer, [texts[typical]], limit, control_tokens=read_as)
    one, batch = ({k: v.to(place) for k, v in inputs.items()} for inputs in (one, batch))
    steps = {
        name: answering(model.to(place), one, batch, place)
        for name, model in ways(path, restored, force=force).items()
    }
    for note in restored.notes:
        print(note)
    print(
        f"{restored.variant.name} on {restored.base.name}, {place}, {torch.get_num_threads()} "
        f"threads: one text of {int(lengths[typical])} tokens, and a batch of {len(texts)} with "
        f"{int(lengths.sum())} tokens (padded to {int(lengths.max())} each); n = {rounds} rounds "
        f"after {WARMUP_ROUNDS}, median [95 % interval]\n"
    )
    print(table(interleaved(steps, rounds), len(texts)))
    if QUANTISED not in steps:
        print("\nthis variant trains the weights themselves: nothing is left to keep in 4 bits")


def table(times: dict[str, list[tuple[float, float]]], size: int) -> str:
    """Latency and throughput of each way, and both over the base's.

    Args:
        times: per way, seconds for one text and for a batch of `size`, one pair a round.
    """

    def ratio(name: str, part: int, *, inverse: bool = False) -> str:
        pairs = zip(times[name], times[BASE], strict=True)
        ratios = [b[part] / a[part] if inverse else a[part] / b[part] for a, b in pairs]
        found = median_interval(ratios)
        interval = f" [{found['low']:.2f}, {found['high']:.2f}]" if found["low"] else ""
        return f"{found['median']:.2f}{interval}"

    lines = [f"{'':<8}  {'ms a text':>9}  {'over base':<18}  {'texts/s':>8}  {'over base':<18}"]
    for name, pairs in times.items():
        one, batch = (statistics.median(pair[part] for pair in pairs) for part in (0, 1))
        latency, throughput = ratio(name, 0), ratio(name, 1, inverse=True)
        lines.append(
            f"{name:<8}  {1e3 * one:>9.2f}  {latency:<18}  {size / batch:>8.0f}  {throughput}"
        )
    return "\n".join(line.rstrip() for line in lines)
