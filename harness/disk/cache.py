"""Files that can be made again, kept on disk for the next process.

It may be deleted at any time; what cannot be read is made again, and what cannot be written is done
without. Where several users share the folder, each believes in files of their own alone, which
nobody else can write: what somebody else has left could be anything.
"""

import contextlib
import os
import stat
import tempfile
from pathlib import Path


def folder() -> Path:
    """$LORA_VARIANTS_CACHE, or ~/.cache/lora-variants."""
    named = os.environ.get("LORA_VARIANTS_CACHE")
    return Path(named or "~/.cache/lora-variants").expanduser()


def read(file: Path) -> bytes | None:
    """The content of a file below `folder()`; None if there is none, or if it may be somebody
    else's: a link, a file of another owner, or one that others can write."""
    try:
        harmless = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe may wait
        descriptor = os.open(file, os.O_RDONLY | harmless)
        with open(descriptor, "rb") as opened:
            found = os.fstat(descriptor)  # of what is read, whatever is put in its place meanwhile
            ours = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
            closed = os.name == "nt" or not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            return opened.read() if stat.S_ISREG(found.st_mode) and ours and closed else None
    except OSError:
        return None


def write(file: Path, content: bytes) -> None:
    """Write a file below `folder()`, whole or not at all, for this user alone."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    except OSError:  # a full disk, a folder that cannot be written
        return
    try:
        with open(descriptor, "wb") as opened:
            opened.write(content)
        os.replace(temporary, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
