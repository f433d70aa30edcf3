"""The output of a bench: a table, a figure, and which targets were missed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from harness.cli import needs
from harness.compare.table import aligned
from harness.words import counted

TARGETS = yaml.safe_load(Path(__file__).with_name("targets.yaml").read_text())
MIB = 2.0**20


def table(rows: Sequence[dict]) -> str:
    """The rows as text, each ratio with its interval; then what allocators cost."""
    columns = ["step ms", "tokens/s", "over its floor", "over peer",
               "peak MiB", "over its floor", "over peer"]  # fmt: skip
    body = [["", *columns]]
    body += [
        [
            row["name"],
            f"{1e3 * row['step_s']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            _ratio(row["step_over_floor"]),
            _ratio(row["step_over_peer"]),
            f"{row['peak_bytes'] / MIB:.1f}",
            f"{row['peak_over_floor']:.2f}",
            "" if row["peak_over_peer"] is None else f"{row['peak_over_peer']:.2f}",
        ]
        for row in rows
    ]
    lines = aligned(body, left=(0, 3, 4, 6, 7))
    for row in rows:
        if row["allocation_s"] is not None:
            lines.append(
                f"{row['name']}: its allocator's step takes {1e3 * row['allocation_s']:.0f} ms, "
                f"{100 * row['allocation_frac']:.2f} % of training at one in 100 steps"
            )
    return "\n".join(lines)


def _ratio(found: Mapping[str, float | None] | None) -> str:
    if found is None:
        return ""
    interval = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{found['median']:.2f}{interval}"


def missed(model: str, rows: Sequence[dict]) -> list[str]:
    """A sentence for each target of targets.yaml that was missed by more than the noise: the whole
    interval lies beyond it, or without one the median. Memory has no noise.

    Raises ValueError for a model that has no targets.
    """
    if model not in TARGETS:
        raise ValueError(f"there are no targets for {model}; there are for {', '.join(TARGETS)}.")
    sentences = []
    for row in rows:
        found = row["step_over_floor"]
        surely = found["median"] if found["low"] is None else found["low"]
        if (target := TARGETS[model].get(row["name"])) is not None and surely > target:
            sentences.append(f"{row['name']} takes {_ratio(found)} of its floor; target {target}")
        if row["peer"] is None:
            continue
        found = row["step_over_peer"]
        surely = found["median"] if found["low"] is None else found["low"]
        if surely > 1.0:
            sentences.append(f"{row['name']} takes {_ratio(found)} of {row['peer']}'s time")
        if row["peak_over_peer"] > 1.0:
            sentences.append(
                f"{row['name']} needs {row['peak_over_peer']:.4f} of {row['peer']}'s memory"
            )
    return sentences


def figure(settings: Mapping[str, Any], rows: Sequence[dict]) -> str:
    """SVG text: each row's step over its floor, a row's peer beneath it."""
    needs("matplotlib")
    import matplotlib.style
    from matplotlib.figure import Figure

    from harness.compare.look import COLORS, INK, LOOK, Drawing, svg

    shown = [row for row in rows if row["floor"] != row["name"]]
    with matplotlib.style.context(LOOK):
        drawn = Figure(figsize=(6.0, 0.9 + 0.24 * len(shown)))
        axes = drawn.subplots()
        peers = {row["peer"] for row in rows}
        for y, row in enumerate(shown):
            ratio = row["step_over_floor"]
            color = INK if row["name"] in peers else COLORS[0]
            if ratio["low"] is not None:
                axes.plot([ratio["low"], ratio["high"]], [-y, -y], color=color, lw=1.2)
            filled = "none" if row["name"] in peers else color
            axes.plot(ratio["median"], -y, "o", color=color, markerfacecolor=filled)
        axes.axvline(1.0, color=INK, lw=0.8, alpha=0.6)
        axes.set_yticks([-y for y in range(len(shown))], [row["name"] for row in shown])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("step over its floor, the frozen base alone")
        caption = (
            f"{describe(settings)}. Hollow: peft, bitsandbytes. "
            "Lines: 95 % interval of the median over rounds."
        )
        return svg(Drawing("bench", "Step time over the frozen base", caption, drawn))


def describe(settings: Mapping[str, Any]) -> str:
    device = settings["device"]
    where = counted(settings["threads"], "thread") if device == "cpu" else device
    return (
        f"{settings['base']}, {settings['rows']} x {settings['tokens']} tokens, rank "
        f"{settings['rank']}, {where}, "
        f"{settings['dtype']}{', compiled' if settings['compiled'] else ''}, "
        f"n = {settings['rounds']} rounds"
    )
