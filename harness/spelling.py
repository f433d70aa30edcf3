"""A misspelt name is answered with the nearest one that exists."""

import difflib
from collections.abc import Iterable


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The known name most like `word`, or None if none is."""
    close = difflib.get_close_matches(str(word), sorted(set(known)), n=1, cutoff=0.5)
    return close[0] if close else None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """ " Did you mean x?" for the end of an error message, or nothing."""
    name = nearest(word, known)
    return f" Did you mean {name}?" if name else ""
