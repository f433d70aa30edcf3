"""Regular expressions from files and settings, matched within a limit of time.

A pattern such as (([a-z.]+)*)*! takes ages to fail on thirty letters. The package regex, which
matches as re does, can be told to give up.
"""

import math
import re
import time

import regex

SECONDS = 5.0  # that all patterns of one file may take together; those that people write take ms
LONGEST, MOST_REPEATS = 500, 1000  # characters, and copies that {n} makes: a compiled one has them


def compiled(pattern: str, where: str) -> "regex.Pattern[str]":
    """The pattern, ready to match. Raises ValueError, beginning with `where`, if it is none, or
    would take more memory than a pattern is worth."""
    groups = re.findall(r"\{([^{}]*)\}", pattern)
    counts = [max([1, *map(int, re.findall(r"\d{1,9}", group))]) for group in groups]
    if len(pattern) > LONGEST or math.prod(counts) > MOST_REPEATS or re.search(r"\d{10}", pattern):
        raise ValueError(f"{where} is too large a regular expression.")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"{where} is no regular expression: {error}.") from None


class Budget:
    """The time that is left for the patterns of one file."""

    def __init__(self, where: str, seconds: float = SECONDS):
        self.where, self.seconds = where, seconds

    def search(self, pattern: "regex.Pattern[str]", text: str) -> "regex.Match[str] | None":
        """The first match in `text`. Raises ValueError, naming the pattern, when time is out."""
        start = time.monotonic()
        try:
            return pattern.search(text, timeout=max(self.seconds, 1e-3))
        except TimeoutError:
            raise ValueError(
                f"{self.where}: the pattern {pattern.pattern[:60]!r} takes too long to match."
            ) from None
        finally:
            self.seconds -= time.monotonic() - start
