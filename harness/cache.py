"""What can be made again, kept on disk for the next process.

It may be deleted at any time; what cannot be read is made again, and what cannot be written is done
without.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def folder() -> Path:
    """$LORA_VARIANTS_CACHE, or ~/.cache/lora-variants."""
    named = os.environ.get("LORA_VARIANTS_CACHE")
    return Path(named or "~/.cache/lora-variants").expanduser()


def write(file: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a file below `folder()`, whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        os.replace(temporary, file)
    except (OSError, SafetensorError):  # a full disk
        with contextlib.suppress(OSError):
            temporary.unlink()
