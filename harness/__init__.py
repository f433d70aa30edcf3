"""The controls: everything that two runs under comparison must share.

A stranger reads the folders as the life of a result: asked (config), built (models, tasks), run
(loop, on a machine), left (adapter), many (study), said (compare).
"""

import sys
from importlib.abc import MetaPathFinder
from typing import Any

# Commands that had another name.
_MOVED = {"harness.control": "harness.loop.repeat", "harness.evaluate": "harness.adapter.evaluate",
          "harness.export": "harness.adapter.export",
          "harness.predict": "harness.adapter.predict"}  # fmt: skip


class _Moved(MetaPathFinder):
    """Answers a command's former name with the present one."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name in _MOVED:
            raise ImportError(f"it is python -m {_MOVED[name]} now")


sys.meta_path.append(_Moved())
