"""Step time of every variant and of peft's methods over one floor, interleaved in one process.

    python -m harness.bench
    python -m harness.bench --variant lora --variant dora --rounds 31 --json bench.json

The floor is the frozen base: forward, loss, and backward to the embedded inputs, so that the
gradient runs through the whole stack and reaches no parameter. A step is what training does:
forward, cross-entropy and the method's penalty, backward, AdamW (fused, for all) on what is
trained, the method's hooks, zero_grad. What is printed is the whole step over the floor; forward
and backward alone are in the JSON. Token ids go in, so nothing is differentiated that training
would not. The same layers are adapted and the same head is trained by every method. Adapters are
in training mode, the base is not, so that its own dropout is off. Steps are numbered from the
middle of a run, where rank allocators are at work.

Each round times every row once and begins one row later than the last; rows with the same peer are
neighbours. A ratio is the median over rounds of the ratios within a round, with a 95 % interval
from order statistics (none below 6 rounds).
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from torch import Tensor, nn

import variants
from harness.models.base import BaseModel
from harness.spelling import did_you_mean
from variants.inject import is_inside

CONF = Path(__file__).resolve().parents[1] / "conf"
FLOOR, FULL = "floor", "every parameter"
LABELS = ("negative", "positive")
ALPHA_OVER_RANK = 2  # alpha 16 at rank 8
LR = 1e-4  # of what has no rate of its own; it does not matter to the time
TOTAL_STEPS = 300  # of the run that the steps are taken from the middle of
WARMUP_ROUNDS = 3  # not counted: first touches of memory, optimiser state

Hook = Callable[[torch.optim.Optimizer, int], Any]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        step: runs the step of a given number; returns the seconds of forward and backward, and
            those of the whole step.
        peer: the row of peft's counterpart, or None.
    """

    name: str
    step: Callable[[int], tuple[float, float]]
    peer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all rows have in common.

    Args:
        batch: input_ids and attention_mask (batch, tokens), labels (batch,), drawn at random.
        rank, dropout: of every method that has them; a dropout of 0 leaves its rows out.
    """

    base: BaseModel
    batch: dict[str, Tensor]
    rank: int
    dropout: float

    def floor(self) -> Row:
        model = copy.deepcopy(self.base.model).requires_grad_(False)
        inputs = dict(self.batch)
        with torch.no_grad():
            embedded = model.get_input_embeddings()(inputs.pop("input_ids"))

        def step(number: int) -> tuple[float, float]:
            start = time.perf_counter()
            model(**inputs, inputs_embeds=embedded.detach().requires_grad_()).loss.backward()
            elapsed = time.perf_counter() - start
            return elapsed, elapsed

        return Row(FLOOR, step)

    def full(self) -> Row:
        """Plain fine-tuning of the whole model, embeddings included."""
        model = copy.deepcopy(self.base.model)
        return self._row(FULL, model, model.parameters())

    def variant(self, name: str, dropout: float, peer: str | None) -> Row | None:
        """conf/variant/<name>.yaml; None if it has no dropout and should have some."""
        variant, uses_dropout = load_variant(name, self.rank, dropout)
        if dropout and not uses_dropout:
            return None
        model = copy.deepcopy(self.base.model)
        layers = variants.inject(model, variant, seed=0, head=self.base.head)
        for layer in layers.values():
            layer.train()
        allocator = variant.allocator and variant.allocator(layers, total_steps=TOTAL_STEPS, seed=0)
        return self._row(
            _with_dropout(name, dropout),
            model,
            variant.groups(model, lr=variant.lr),
            peer=peer,
            before=lambda step: variants.begin_step(layers, step),
            penalty=lambda: variant.penalty(layers),
            after=lambda optimizer, step: variants.after_step(layers, optimizer, step, allocator),
        )

    def peer(self, name: str, dropout: float) -> Row:
        """peft's method on the same layers, with the same head."""
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer

        targets = [
            path
            for path, module in self.base.model.named_modules()
            if isinstance(module, nn.Linear) and not is_inside(path, self.base.head)
        ]
        shared: dict[str, Any] = {
            "lora_alpha": ALPHA_OVER_RANK * self.rank,
            "lora_dropout": dropout,
            "target_modules": targets,
            "modules_to_save": list(self.base.head),
        }
        config: peft.PeftConfig
        if name == "AdaLoRA":  # the phases and the budget of the paper, as in conf/variant
            config = peft.AdaLoraConfig(
                init_r=self.rank,
                target_r=max(1, round(self.rank / 1.5)),
                tinit=round(0.15 * TOTAL_STEPS),
                tfinal=round(0.45 * TOTAL_STEPS),
                total_step=TOTAL_STEPS,
                orth_reg_weight=0.1,
                **shared,
            )
        else:
            config = peft.LoraConfig(r=self.rank, use_dora=name == "DoRA", **shared)
        model = peft.get_peft_model(copy.deepcopy(self.base.model), config).eval()
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.train()
        allocate = getattr(model.base_model, "update_and_allocate", lambda step: None)
        return self._row(
            _with_dropout(f"peft {name}", dropout),
            model,
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            after=lambda optimizer, step: allocate(step),
        )

    def _row(
        self,
        name: str,
        model: nn.Module,
        groups: Iterable[Any],
        *,
        peer: str | None = None,
        before: Callable[[int], Any] = lambda step: None,
        penalty: Callable[[], Tensor | None] = lambda: None,
        after: Hook = lambda optimizer, step: None,
    ) -> Row:
        optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)

        def step(number: int) -> tuple[float, float]:
            start = time.perf_counter()
            before(number)
            loss = model(**self.batch).loss
            if (term := penalty()) is not None:
                loss = loss + term
            loss.backward()
            halfway = time.perf_counter()
            optimizer.step()
            after(optimizer, number)
            optimizer.zero_grad()
            return halfway - start, time.perf_counter() - start

        return Row(name, step, peer)


PEERS = ("LoRA", "DoRA", "AdaLoRA")


def peer_of(name: str) -> str | None:
    """peft's counterpart of a variant: the method that its name starts with."""
    return next((peer for peer in PEERS if peer.lower() == name.partition("_")[0]), None)


def _with_dropout(name: str, dropout: float) -> str:
    return f"{name}, dropout {dropout:g}" if dropout else name


def variant_names() -> list[str]:
    return sorted(file.stem for file in (CONF / "variant").glob("*.yaml"))


def _compose(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def load_variant(name: str, rank: int, dropout: float) -> tuple[variants.Variant, bool]:
    """The variant of conf/variant/<name>.yaml, and whether its adapter has a dropout.

    Raises ValueError on a name that has no such file.
    """
    if name not in variant_names():
        hint = did_you_mean(name, variant_names()) or f" Known: {', '.join(variant_names())}."
        raise ValueError(f"there is no variant {name!r} in conf/variant.{hint}")
    settings = (f"rank={rank}", f"alpha={ALPHA_OVER_RANK * rank}", f"dropout={dropout}")
    cfg = _compose(f"variant={name}", *settings)
    return instantiate(cfg.variant), "dropout" in cfg.variant.adapter


def load_base(name: str) -> BaseModel:
    """The model of conf/model/<name>.yaml with a head of two labels."""
    known = sorted(file.stem for file in (CONF / "model").glob("*.yaml"))
    if name not in known:
        raise ValueError(f"there is no model {name!r} in conf/model. Known: {', '.join(known)}.")
    return instantiate(_compose(f"model={name}").model)(labels=LABELS, seed=0)


def draw_batch(base: BaseModel, rows: int, tokens: int) -> dict[str, Tensor]:
    """Random token ids without padding. Raises ValueError if the model is too short for them."""
    if tokens > base.max_tokens:
        raise ValueError(f"{base.name} takes at most {base.max_tokens} tokens; found {tokens}.")
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.model.get_input_embeddings().get_parameter("weight").shape[0]
    special = max(base.tokenizer.all_special_ids) + 1
    return {
        "input_ids": torch.randint(special, vocabulary, (rows, tokens), generator=generator),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.long),
        "labels": torch.randint(len(LABELS), (rows,), generator=generator),
    }


def all_rows(bench: Bench, names: Sequence[str], peers: Sequence[str]) -> list[Row]:
    """The floor, then each peer before the variants it is compared with, then all others."""
    rows = [bench.floor()]
    dropouts = [0.0, bench.dropout] if bench.dropout else [0.0]
    for peer in (*peers, None):
        for dropout in dropouts:
            compared = [name for name in names if (peer_of(name) if peers else None) == peer]
            if peer and compared:
                rows.append(bench.peer(peer, dropout))
            counterpart = rows[-1].name if peer else None
            found = (bench.variant(name, dropout, counterpart) for name in compared)
            rows += [row for row in found if row is not None]
    return [*rows, bench.full()]


def measure(rows: Sequence[Row], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Per row, the seconds of forward and backward and of the whole step, one pair a round."""
    times: dict[str, list[tuple[float, float]]] = {row.name: [] for row in rows}
    for number in range(WARMUP_ROUNDS + rounds):
        for index in range(len(rows)):
            row = rows[(number + index) % len(rows)]
            elapsed = row.step(TOTAL_STEPS // 2 + number)
            if number >= WARMUP_ROUNDS:
                times[row.name].append(elapsed)
    return times


def median_interval(values: Sequence[float]) -> dict[str, float | None]:
    """The median and the order statistics that enclose it with at least 95 %.

    With n values, the k-th from either end, k being the largest with P(Binomial(n, 1/2) < k) at
    most 2.5 %.
    """
    n, ordered = len(values), sorted(values)
    k, below = 0, 0.0
    while (below := below + math.comb(n, k) / 2**n) <= 0.025:
        k += 1
    low, high = (ordered[k - 1], ordered[n - k]) if k else (None, None)
    return {"median": statistics.median(ordered), "low": low, "high": high}


def summarize(rows: Sequence[Row], times: dict[str, list[tuple[float, float]]]) -> list[dict]:
    def over(name: str, other: str, part: int = 1) -> dict[str, float | None]:
        pairs = zip(times[name], times[other], strict=True)
        return median_interval([mine[part] / theirs[1] for mine, theirs in pairs])

    return [
        {
            "name": row.name,
            "step_s": statistics.median(step for _, step in times[row.name]),
            "step_over_floor": over(row.name, FLOOR),
            "forward_backward_over_floor": over(row.name, FLOOR, part=0),
            "peer": row.peer,
            "step_over_peer": over(row.name, row.peer) if row.peer else None,
            "seconds": times[row.name],
        }
        for row in rows
    ]


def table(rows: Sequence[dict]) -> str:
    def ratio(found: dict[str, float | None] | None) -> str:
        if found is None:
            return ""
        interval = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
        return f"{found['median']:.2f}{interval}"

    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':<{width}}  {'step ms':>8}  {'over the floor':<18}  {'over peft':<18}"]
    for row in rows:
        floor, peer = ratio(row["step_over_floor"]), ratio(row["step_over_peer"])
        name, step_ms = row["name"], 1e3 * row["step_s"]
        lines.append(f"{name:<{width}}  {step_ms:>8.1f}  {floor:<18}  {peer:<18}".rstrip())
    return "\n".join(lines)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _batch_size(text: str) -> tuple[int, int]:
    try:
        rows, tokens = (_positive(part) for part in text.split("x"))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{text} is not <rows>x<tokens>, for example 32x32"
        ) from None
    return rows, tokens


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(1, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print. A user's mistake ends it with one sentence and exit code 1."""
    parser = _Parser(prog="python -m harness.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="minilm", help="a file of conf/model (minilm)")
    parser.add_argument("--variant", action="append", help="a file of conf/variant; all if absent")
    parser.add_argument("--rank", type=_positive, default=8)
    parser.add_argument("--dropout", type=_probability, default=0.1, help="0 leaves its rows out")
    parser.add_argument(
        "--tokens", type=_batch_size, default=(32, 32), help="rows x tokens (32x32)"
    )
    parser.add_argument("--rounds", type=_positive, default=15)
    parser.add_argument("--threads", type=_positive, default=2)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError, HydraException) as error:
        cause = error.__cause__ if isinstance(error, HydraException) else None
        sys.exit(f"error: {cause or error}")


def run(options: argparse.Namespace) -> None:
    if options.json and not options.json.absolute().parent.is_dir():
        raise ValueError(f"--json is {options.json}, and there is no folder {options.json.parent}.")
    torch.set_num_threads(options.threads)
    names = list(dict.fromkeys(options.variant or variant_names()))
    peers = PEERS if options.peer and find_spec("peft") else ()
    if options.peer and not peers:
        print('peft is not installed, so its rows are left out: pip install -e ".[peers]"')
    base = load_base(options.model)
    bench = Bench(
        base=base,
        batch=draw_batch(base, *options.tokens),
        rank=options.rank,
        dropout=options.dropout,
    )
    rows = all_rows(bench, names, peers)
    summary = summarize(rows, measure(rows, options.rounds))
    settings = {
        "base": base.name,
        "rows": options.tokens[0],
        "tokens": options.tokens[1],
        "rank": options.rank,
        "alpha": ALPHA_OVER_RANK * options.rank,
        "dropout": options.dropout,
        "dtype": "float32",
        "threads": options.threads,
        "rounds": options.rounds,
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")
                     if find_spec(package)},
    }  # fmt: skip
    print(
        f"{base.name}, {settings['rows']} x {settings['tokens']} tokens, rank {options.rank}, "
        f"{options.threads} threads, float32, n = {options.rounds} rounds, median [95 % interval]\n"
    )
    print(table(summary))
    if options.json:
        text = json.dumps({"settings": settings, "rows": summary}, indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
