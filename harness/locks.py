"""One writer for a folder or a file: the system's locks, or a file where it has none.

A lock of the system ends with the process that holds it, however that ends. Some network file
systems have none; there a file `.lock` in the folder names host and process. What a killed process
has left is taken over on its own host; on another nobody can tell, and a user is asked.
"""

import contextlib
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

FILE = ".lock"
EXIT_CODE = 75  # of a run that another process has: "temporary failure", in sysexits.h


class Busy(ValueError):
    """Another process has the folder."""


def lock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Lock an open file or folder until its descriptor is closed; False if another process has it,
    None if there are no locks here."""
    if fcntl is None:
        return None
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def take(folder: Path) -> Callable[[], None]:
    """Lock a folder for as long as this process lives, or until the result is called.

    Raises Busy if another process has it.
    """
    if os.name == "nt":
        return lambda: None
    descriptor = os.open(folder, os.O_RDONLY)
    if (taken := lock(descriptor)) is False:
        time.sleep(0.2)  # maybe one that is only asking, as `is_taken` does
        taken = lock(descriptor)
    if taken:
        return lambda: os.close(descriptor)
    os.close(descriptor)
    if taken is False:
        raise Busy(f"another process is running in {folder}.")
    return _take_file(folder / FILE)


def is_taken(folder: Path) -> bool:
    """Whether a process holds a folder, as far as this one can tell."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    taken = lock(descriptor, shared=True)
    os.close(descriptor)
    return taken is False or (taken is None and _holder(folder / FILE) not in ("", None))


def _take_file(file: Path) -> Callable[[], None]:
    for _ in range(2):
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            if holder := _holder(file):
                raise Busy(
                    f"another process is running in {file.parent}: {holder} made {file.name} "
                    "there, and this file system has no locks to ask; if it has ended, delete the "
                    "file."
                ) from None
            _remove_ended(file)
            continue
        os.write(descriptor, f"{os.getpid()} {platform.node()}".encode())
        os.close(descriptor)
        return lambda: file.unlink(missing_ok=True)
    raise Busy(f"another process is running in {file.parent}.")


def _remove_ended(file: Path) -> None:
    """Remove the file of a process that has ended, and not one that another has just made."""
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        os.rename(file, aside)
        if _holder(aside):
            os.link(aside, file)
        aside.unlink()


def _holder(file: Path) -> str | None:
    """Who has made a lock's file, in words; nothing if that process has ended, None if there is no
    file."""
    try:
        pid, _, host = file.read_text().partition(" ")
    except FileNotFoundError:
        return None
    except OSError:
        return "somebody"
    if host == platform.node() and pid.isdigit():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return ""
        except OSError:
            pass
    return f"process {pid} on {host}" if host else "somebody"
