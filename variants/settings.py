"""Checks of what a user has set: ValueError with the key, what was found and what is allowed."""

import json
import math
from typing import Any, get_args


def check_type(key: str, value: Any, expected: Any) -> None:
    """Raise ValueError unless `value` is of the type `expected` (int counts as a float)."""
    allowed = get_args(expected) or (expected,)
    if type(value) in allowed or (type(value) is int and float in allowed):
        return
    names = {
        "NoneType": "null",
        "str": "text",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "list": "a list",
        "dict": "a mapping",
    }
    wanted = " or ".join(names[kind.__name__] for kind in allowed)
    raise ValueError(f"{key} is {value!r}; it must be {wanted}.")


def check_types(expected: Any, **values: Any) -> None:
    """`check_type` for each of `values`."""
    for key, value in values.items():
        check_type(key, value, expected)


def check_positive(key: str, value: Any, *, or_zero: bool = False) -> None:
    """Raise ValueError unless `value` is a finite number above 0, or 0 where that is allowed."""
    check_type(key, value, float)
    if not (math.isfinite(value) and (value > 0 or (or_zero and value == 0))):
        wanted = "0 or more" if or_zero else "positive"
        raise ValueError(f"{key} is {value}; it must be {wanted}.")


def check_text(key: str, value: Any) -> None:
    """Raise ValueError, with what to type, unless `value` is text: YAML takes 2024 for a number."""
    if not isinstance(value, str):
        shown = json.dumps(value, default=str)
        raise ValueError(f"{key} is {shown}; it must be text, such as '\"{shown}\"' or ./{shown}.")
