"""Step time of every variant and of peft's, over the floor: one process, interleaved.

    python -m harness.bench
    python -m harness.bench --variant lora --variant dora --rounds 31 --json bench.json

The floor is the frozen base: forward, loss, and backward to the embedded inputs, so that the
gradient runs through the whole stack but reaches no parameter. A step is what training does: forward,
loss (cross-entropy, with the method's penalty), backward, fused AdamW on what is trained, the
method's hooks, zero_grad; token ids go in, so that nothing is differentiated that training would
not. The head is trained with every method. The base has its own dropout off; adapters are in
training mode. Steps are numbered from the middle of a run, where allocators are at work.

Every round times each row once, and each round starts one row later. A row's figure is the median
over rounds of its time over the floor's (or over its counterpart's in peft) in the same round, with
a 95 % interval from order statistics.
"""

import argparse
import copy
import difflib
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

import variants
from harness.models.base import BaseModel
from variants.inject import is_inside

CONF = Path(__file__).resolve().parents[1] / "conf"
WARMUP_ROUNDS = 3  # not counted: first touches of memory, optimiser state, caches
ALPHA_OVER_RANK = 2
PEER_LR = 2e-3
FLOOR = "floor"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        step: runs one step, given its number, and returns the seconds that forward and backward
            took, and those of the whole step.
        peer: the name of the row with peft's counterpart, or None.
    """

    name: str
    step: Callable[[int], tuple[float, float]]
    peer: str | None = None


def training_row(
    name: str,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    groups: Iterable[Any],
    *,
    peer: str | None = None,
    before: Callable[[int], Any] = lambda step: None,
    penalty: Callable[[], Tensor | None] = lambda: None,
    after: Callable[[torch.optim.Optimizer, int], Any] = lambda optimizer, step: None,
) -> Row:
    """A row that trains `groups` of `model`; the hooks are the method's own."""
    optimizer = torch.optim.AdamW(groups, lr=PEER_LR, fused=True)

    def step(number: int) -> tuple[float, float]:
        start = time.perf_counter()
        before(number)
        loss = model(**batch).loss
        if (extra := penalty()) is not None:
            loss = loss + extra
        loss.backward()
        halfway = time.perf_counter()
        optimizer.step()
        after(optimizer, number)
        optimizer.zero_grad()
        end = time.perf_counter()
        return halfway - start, end - start

    return Row(name, step, peer)


def floor_row(base: BaseModel, batch: Mapping[str, Tensor]) -> Row:
    model = copy.deepcopy(base.model).requires_grad_(False)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(batch["input_ids"])
    inputs = {key: value for key, value in batch.items() if key != "input_ids"}

    def step(number: int) -> tuple[float, float]:
        start = time.perf_counter()
        model(**inputs, inputs_embeds=embedded.detach().requires_grad_()).loss.backward()
        end = time.perf_counter()
        return end - start, end - start

    return Row(FLOOR, step)


def main():
    import sys, peft

    torch.set_num_threads(2)
    from harness.models import minilm

    base = minilm.load(labels=("negative", "positive"), seed=0)
    g = torch.Generator().manual_seed(0)
    batch = dict(
        input_ids=torch.randint(1000, 30000, (32, 32), generator=g),
        attention_mask=torch.ones(32, 32, dtype=torch.long),
        labels=torch.randint(0, 2, (32,), generator=g),
    )
    rows = [floor_row(base, batch)]
    targets = [
        p
        for p, m in base.model.named_modules()
        if isinstance(m, nn.Linear) and not is_inside(p, base.head)
    ]
    from peft.tuners.tuners_utils import BaseTunerLayer

    print(len(targets), base.head)
    for name, cfg in {
        "LoRA": peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=targets, modules_to_save=list(base.head)
        ),
        "LoRA d": peft.LoraConfig(
            r=8,
            lora_alpha=16,
            lora_dropout=0.1,
            target_modules=targets,
            modules_to_save=list(base.head),
        ),
        "DoRA": peft.LoraConfig(
            r=8,
            lora_alpha=16,
            use_dora=True,
            target_modules=targets,
            modules_to_save=list(base.head),
        ),
        "AdaLoRA": peft.AdaLoraConfig(
            init_r=8,
            target_r=5,
            lora_alpha=16,
            tinit=45,
            tfinal=135,
            total_step=300,
            target_modules=targets,
            modules_to_save=list(base.head),
        ),
    }.items():
        m = peft.get_peft_model(copy.deepcopy(base.model), cfg)
        m.eval()
        for x in m.modules():
            if isinstance(x, BaseTunerLayer):
                x.train()
        after = (
            (lambda o, s, m=m: m.base_model.update_and_allocate(s))
            if name == "AdaLoRA"
            else (lambda o, s: None)
        )
        rows.append(
            training_row(
                "peft " + name,
                m,
                batch,
                [p for p in m.parameters() if p.requires_grad],
                after=after,
            )
        )
    m = copy.deepcopy(base.model)
    rows.append(training_row("full", m, batch, m.parameters()))
    fb = {r.name: [] for r in rows}
    st = {r.name: [] for r in rows}
    n = int(sys.argv[1])
    for k in range(n + 3):
        for i in range(len(rows)):
            r = rows[(i + k) % len(rows)]
            a, b = r.step(150 + k)
            if k >= 3:
                fb[r.name].append(a)
                st[r.name].append(b)
    for r in rows:
        f = [x / y for x, y in zip(fb[r.name], fb["floor"])]
        s = [x / y for x, y in zip(st[r.name], fb["floor"])]
        print(
            f"{r.name:14} {statistics.median(fb[r.name]) * 1e3:8.1f} {statistics.median(st[r.name]) * 1e3:8.1f} fb {statistics.median(f):.3f} step {statistics.median(s):.3f} min {min(fb[r.name]) / min(fb['floor']):.3f} {min(st[r.name]) / min(fb['floor']):.3f}"
        )


if __name__ == "__main__":
    main()
