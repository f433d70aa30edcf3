"""Files and folders that are written whole or not at all, to last.

Each is made under a temporary name and takes its own when it is on the disk: after a crash, a kill
or a full disk there is what was there before. No torch.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from harness.disk.digest import mapped, null_unless_finite


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path next to `path` for the block to make a file or a folder at; at the block's
    end it takes the place of what is there.

    OSError naming `path` if it cannot be written, on a full disk say; nothing is left of it then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        _remove(temporary)
        yield temporary
        for made in (*temporary.rglob("*"), temporary):
            _sync(made)
        if temporary.is_dir() and path.is_dir():  # whose place no other folder takes
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except BaseException:  # the user's interrupt too
            if old.exists():
                os.replace(old, path)
            raise
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path} could not be written: {reason}.") from error
    finally:
        _remove(temporary)
        _remove(old)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """`whole` for a folder: an empty one to fill, made with the folders above it. What processes
    that were killed have left of the same one is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, re.escape(path.name))
    with whole(path) as temporary:
        temporary.mkdir()
        yield temporary


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; see `whole`."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove temporary files and folders of ours, of processes that were killed meanwhile.

    Args:
        names: a regular expression of the names that they were to have.
    """
    for left in folder.iterdir():
        if re.fullmatch(rf"\.({names})\.\d+(\.old)?", left.name):
            _remove(left)


def make_folder(path: Path, setting: str) -> None:
    """Make a folder and those above it, if need be. OSError naming the setting to change."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{path} cannot be made: {error.strerror}; give another {setting}."
        ) from error


def to_json(value: Any) -> Any:
    """`value` with what JSON lacks (NaN, infinities) as null."""
    return mapped(value, null_unless_finite)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
