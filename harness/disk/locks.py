"""One writer for a folder: a lock on its file `.lock`, which names the host and the process.

A lock of the system ends with the process that holds it, however that ends; it is on a file and not
on the folder, since NFS tells the other hosts of locks on files alone. Some network file systems
have no locks: there the file itself is the lock. A process that was killed leaves its file, which
is taken over on its own host; on another nobody can tell, and a user is asked.
"""

import os
import platform
import re
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
    """Lock an open file until its descriptor is closed; False if another process has it, None if
    there are no locks here."""
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

    Raises Busy if another process has it, OSError if the folder takes no file.
    """
    if os.name == "nt":
        return lambda: None
    for pause_s in (0.2, 0.2, 0):  # the other one may only be asking, or ending
        descriptor = _take_file(folder / FILE)
        if descriptor is not None:
            return lambda: _release(folder / FILE, descriptor)
        time.sleep(pause_s)
    raise Busy(f"{taken_by(folder) or _BUSY.format(folder)}.")


def taken_by(folder: Path) -> str:
    """Says who has a folder, as far as this process can tell; nothing if nobody has."""
    file = folder / FILE
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return ""
    except OSError:  # another user's
        return _BUSY.format(folder)
    taken = lock(descriptor, shared=True)
    os.close(descriptor)
    holder = "" if taken else _holder(file)
    if taken is False:
        return f"{_BUSY.format(folder)}: {holder or 'it has just ended'}"
    if not holder:
        return ""
    return (
        f"{_BUSY.format(folder)}: {holder} made {FILE} there, and this file system has no locks to "
        f"ask; if it has ended, delete {file}"
    )


_BUSY = "another process is running in {}"


def _take_file(file: Path) -> int | None:
    """Make or open the file, lock it and sign it; its descriptor, or None if another has it."""
    flags, made = os.O_RDWR | os.O_NOFOLLOW, True
    try:
        descriptor = os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        made = False
        try:
            descriptor = os.open(file, flags)
        except FileNotFoundError:
            return None
    taken = lock(descriptor)
    ours = made if taken is None else taken and _is_at(file, descriptor)
    if not ours:
        os.close(descriptor)
        if taken is None and not _holder(file):
            _remove_ended(file)
        return None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()} {platform.node()}".encode())
    return descriptor


def _release(file: Path, descriptor: int) -> None:
    """Remove the file while it is locked: who opens it now finds it gone, and makes another."""
    if _is_at(file, descriptor):  # and not in a folder that was moved
        file.unlink(missing_ok=True)
    os.close(descriptor)


def _is_at(file: Path, descriptor: int) -> bool:
    """Compares the open file with the one that has the name now."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except OSError:
        return False


def _remove_ended(file: Path) -> None:
    """Remove the file of a process that has ended, and not one that another has just made."""
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        os.rename(file, aside)
        if _holder(aside):
            os.link(aside, file)
    except (FileNotFoundError, FileExistsError):
        pass
    aside.unlink(missing_ok=True)


def _holder(file: Path) -> str:
    """Names who has made a lock's file; nothing if that process has ended or there is no file."""
    try:
        text = file.read_text(errors="replace")[:300] if file.is_file() else ""
    except FileNotFoundError:
        return ""
    except OSError:
        return "somebody"
    signed = re.fullmatch(r"(\d{1,9}) ([\w.-]{1,253})", text, re.ASCII)
    if signed is None:
        return "somebody" if os.path.lexists(file) else ""
    pid, host = signed.groups()
    if host == platform.node():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return ""
        except OSError:
            pass
    return f"process {pid} on {host}"
