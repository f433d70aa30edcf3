"""The files and the code that a run has read, and the check that they are unchanged. No torch.

run.json keeps size, times and sha256 of each file that was read. A launcher that passes over
finished runs compares them, which costs no model. A run compares more, the fingerprints of what it
made of the files: so a file that changed is no verdict. The run is started, and says itself whether
its result still stands.
"""

import errno
import functools
import hashlib
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.disk.digest import file_sha256

ROOT = Path(__file__).resolve().parents[2]
# Where the code is that makes data, tokens and a base of files, and what it calls.
_READERS = ("harness/tasks", "harness/models")
_CODE = {".py", ".txt", ".gz"}  # and the data that are part of it
_PACKAGES = ("transformers", "tokenizers", "safetensors", "numpy", "sympy", "mathematics-dataset")
# What starts runs, or looks at them when they have ended: no run's numbers depend on it.
_AROUND = ("study", "compare", "advise", "inspect", "bench", "machine/processes.py",
           "adapter/predict.py", "adapter/evaluate.py", "adapter/serving.py")  # fmt: skip
# Of a model's folder: other files, the checkpoints of a training say, are not read.
_OF_MODEL = {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"}


# ---- code ----------------------------------------------------------------------------------------


@functools.cache
def code(places: Sequence[str], without: Collection[str] = ()) -> Mapping[str, str]:
    """sha256 of each file of code, or of the data next to it, at some places below the project, by
    its path there."""
    files: list[Path] = []
    for place in places:
        path = ROOT / place
        files += sorted(path.rglob("*")) if path.is_dir() else [path] * path.is_file()
    left_out = tuple(ROOT / place for place in without)
    return {
        file.relative_to(ROOT).as_posix(): _sha256(file)
        for file in files
        if file.suffix in _CODE and not any(file.is_relative_to(place) for place in left_out)
    }


def code_of_runs() -> Mapping[str, str]:
    """The code on which the numbers of a run depend: tests, documents and what only starts runs or
    reads results are not among it."""
    return code(("variants", "harness", "train.py"), tuple(f"harness/{name}" for name in _AROUND))


def code_of_readers() -> str:
    """Digest of the code on which data, their tokens and a base depend."""
    return hashlib.sha256(repr(sorted(code(_READERS).items())).encode()).hexdigest()


# ---- files ---------------------------------------------------------------------------------------


def record(files: Iterable[Path] | None) -> dict[str, Any] | None:
    """The record in run.json of the files, and of the code and the packages that read them.

    Args:
        files: paths as they were given, of files, and of folders, whose names count; None, for
            None, if it cannot be told from files what was read.
    """
    if files is None:
        return None
    listed = {str(file): {**_stat(file), "sha256": _sha256(file)} for file in files}
    return {"files": listed, "code": code_of_readers(), "packages": _packages()}


def changed(record: Any, *, times: bool = True) -> str | None:
    """The first thing that is not as run.json has it, or None. Without a record nothing is known,
    so that this is the thing; `times` as in `changed_file`."""
    try:
        if record["code"] != code_of_readers() or record["packages"] != _packages():
            return "the code that reads data and base"
    except (KeyError, TypeError):
        return "what was read, since that is not recorded"
    return changed_file(record, times=times)


def changed_file(record: Any, *, times: bool = True) -> str | None:
    """The first of the recorded files that is not what it was, or None.

    Args:
        times: believe them, and the size; else the sha256 alone.
    """
    try:
        for name, was in record["files"].items():
            now = _stat(Path(name))
            if times and all(was[key] == value for key, value in now.items()):
                continue
            if was["sha256"] != _sha256_once(Path(name), **now):
                return str(name)
    except (KeyError, TypeError, AttributeError, ValueError):
        return "what was read, since that is not recorded"
    except OSError as error:
        return str(error.filename)
    return None


def named_files(settings: Any) -> list[Path]:
    """The files whose paths are among some settings."""
    if isinstance(settings, Mapping):
        return [file for value in settings.values() for file in named_files(value)]
    if isinstance(settings, list):
        return [file for value in settings for file in named_files(value)]
    try:
        path = Path(settings).expanduser() if isinstance(settings, str) and settings else None
        return [path] if path is not None and path.is_file() else []
    except (OSError, ValueError, RuntimeError):  # no name that a file could have
        return []


def model_files(folder: Path) -> tuple[Path, ...]:
    """The files of a model's or an adapter's folder that may be read, and the folder itself: a file
    that is added changes it."""
    return (folder, *(path for path in _children(folder) if path.is_file()))


def _children(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in _OF_MODEL)


def _stat(path: Path) -> dict[str, int]:
    """Size and times of a file, which differ once it was written; ctime cannot be set back."""
    found = path.stat()
    size = 0 if path.is_dir() else found.st_size
    return {"size": size, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}


@functools.lru_cache(maxsize=1024)
def _sha256_once(path: Path, **stat: int) -> str:
    """Once in this process for a file as it is, for all runs that have read it."""
    return _sha256(path)


def _sha256(path: Path) -> str:
    if path.is_dir():
        return hashlib.sha256(
            "\n".join(child.name for child in _children(path)).encode()
        ).hexdigest()
    if not path.is_file():  # a pipe or a device may never end
        raise OSError(errno.EINVAL, "no file", str(path))
    return file_sha256(path)


@functools.cache
def _packages() -> Mapping[str, str | None]:
    python = ".".join(map(str, sys.version_info[:2]))
    return {"python": python} | {name: package_version(name) for name in _PACKAGES}


def package_version(name: str) -> str | None:
    """The version of a package; None if it is absent, or a copy without metadata."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
