"""Passwords and keys are never among the settings of a run, which are written to files and reports.
No torch: the command line is checked before anything is imported.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

# A word of a variable's name that says that its value is one; short values are none.
_VARIABLE = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)")
_SHORTEST = 8
_SETTING = re.compile(r"(?i)(api_?key|secret|password|passwd|credentials?|(access|auth)_?token)$")


def refuse_secrets(key: str, value: Any) -> None:
    """Raise ValueError if a setting, or one below it, is called like a secret or holds the value of
    an environment variable that is."""
    if _SETTING.search(key):
        raise ValueError(
            f"{key} would be written to files with the other settings; give keys and passwords as "
            "environment variables."
        )
    if isinstance(value, Mapping):
        for name, item in value.items():
            refuse_secrets(f"{key}.{name}" if key else str(name), item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            refuse_secrets(key, item)
    else:
        for variable, secret in os.environ.items():
            held = len(secret) >= _SHORTEST and (secret in str(value) or secret in key)
            if held and _VARIABLE.search(variable.upper()):
                raise ValueError(
                    f"{'a key' if secret in key else key} holds the value of the environment "
                    f"variable {variable}, which would be written to files with the other settings."
                )
