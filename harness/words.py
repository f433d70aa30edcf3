"""Words for people: numbers with their units, kinds of layers, the nearest of known names.

No torch: reports and launchers read this.
"""

import difflib
from collections.abc import Iterable


def count(number: float) -> str:
    """1234567 -> 1.23M"""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def size(number_bytes: float | None) -> str:
    """Bytes in KiB, MiB or GiB."""
    if number_bytes is None:
        return "?"
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if number_bytes >= unit:
            return f"{number_bytes / unit:.1f} {name}"
    return f"{number_bytes / 2**10:.1f} KiB"


def counted(number: int, what: str) -> str:
    """1 run, 2 runs"""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def kind_of(path: str) -> str:
    """encoder.layer.3.query -> encoder.layer.*.query"""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """ " Did you mean x?" for the end of an error message, or nothing. `variants.select.nearest`
    does the same there, where torch is imported, which this module must not need."""
    close = difflib.get_close_matches(str(word), sorted(set(known)), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""
