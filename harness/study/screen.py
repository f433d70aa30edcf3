"""The terminal: lines that stay, a table below them that is drawn again, the end of a log."""

import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

DRAW_S = 0.5  # between drawings of the table
TAIL_LINES = 15  # of a failed job's log


class Screen:
    """Lines that stay and, on a terminal, lines below them that are drawn again in place."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.live = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._drawn: list[str] = []
        self._drawn_at = 0.0

    def say(self, *lines: str) -> None:
        """Print lines that stay; the table below them is soon drawn again."""
        self._write(lines, [])
        self._drawn_at = 0.0

    def draw(self, table: Callable[[int], list[str]] | None) -> None:
        """Draw table(lines available) below, at most every DRAW_S; None removes it."""
        if self.live and (table is None or time.monotonic() - self._drawn_at > DRAW_S):
            self._drawn_at = time.monotonic()
            self._write([], table(shutil.get_terminal_size().lines - 1) if table else [])

    def _write(self, staying: Sequence[str], drawn: Sequence[str]) -> None:
        up = f"\x1b[{len(self._drawn)}F\x1b[J" if self._drawn else ""
        width = shutil.get_terminal_size().columns - 1  # a line that wraps would be two to remove
        self._drawn = [cut(line, width) for line in drawn]
        text = up + "".join(f"{line}\n" for line in [*staying, *self._drawn])
        encoding = self.stream.encoding or "utf-8"
        self.stream.write(text.encode(encoding, "replace").decode(encoding))
        self.stream.flush()


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def tail(log: Path, header: int = 0, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log after its first `header` bytes, without what moves the cursor."""
    with open(log, "rb") as file:
        file.seek(max(header, file.seek(0, os.SEEK_END) - 2**16))
        text = file.read().decode("utf-8", "replace")
    return [printable(line)[:1000] for line in text.splitlines() if line.strip()][-lines:]


def printable(text: str) -> str:
    """One line, without control characters and terminal sequences."""
    text = re.sub(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07)", "", text.expandtabs(4))
    return "".join(c if c.isprintable() else " " for c in text)


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."
