"""Finds a run's folder from its config. No torch: launchers and sweepers read this.

A setting that a job decides only when it starts (the threads if none are given, the device `auto`)
matches any value here.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.compare.multirun import asked
from harness.config.identity import run_key
from harness.disk.read import read_json
from harness.loop.result import Marker, Result

ARCHIVED = "archived"  # a folder of runs that were not run here


@dataclass(frozen=True)
class Found:
    """A run's folder.

    Args:
        result: its result.json; None while it is unfinished.
        written: identifies this result.json, also if a later one has an earlier time.
    """

    path: Path
    config: Mapping[str, Any]
    result: Mapping[str, Any] | None
    written: tuple[int, ...] = ()

    @property
    def inputs(self) -> Any:
        """The record of the files that it read, see `harness.disk.inputs`; None if unknown."""
        try:
            return read_json(self.path / "run.json", dict[str, Any], nonfinite=True).get("inputs")
        except (OSError, ValueError):
            return None


def _asked(config: Mapping[str, Any]) -> str:
    return f"{asked(config)} {config['run_dir']}"  # one run may be kept twice, to compare


class RunIndex:
    """An index of the runs below a folder, which need not exist yet; `find` updates it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._markers: dict[Path, Mapping[str, Any]] = {}  # the configs in them
        self._by_key: dict[str, list[Path]] = {}
        self._known: set[str] = set()  # folders that need no second look

    def _refresh(self) -> None:
        for place, folders, files in os.walk(self.folder):  # does not mind what vanishes meanwhile
            folders[:] = sorted(n for n in folders if os.path.join(place, n) not in self._known)
            if "run.json" not in files:
                continue
            folders.clear()
            marker = Path(place, "run.json")
            if marker in self._markers:
                continue
            try:
                about = read_json(marker, Marker, nonfinite=True)
                config: Mapping[str, Any] = {**about["config"]}
                key = _asked(config)
                _ = config["train"]["threads"], config["train"]["device"]
                ours = about["run_key"] == run_key(config)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue  # gone again, or not one of ours
            if not ours:  # its settings meant another thing then
                continue
            self._markers[marker] = config
            self._known.add(place)
            self._by_key.setdefault(key, []).append(marker)

    def find(self, config: Mapping[str, Any], *, rescan: bool = True) -> Found | None:
        """The run of this resolved config, or None; of several, the one that finished last. It
        looks on the disk for new runs only if none is known and `rescan` allows it."""
        key = _asked(config)
        if rescan and not self._matching(key, config):
            self._refresh()
        found: list[tuple[bool, int, Found | None]] = []
        for marker in self._matching(key, config):
            file = marker.with_name("result.json")
            config, path = self._markers[marker], marker.parent
            here = ARCHIVED not in path.parts  # before the time, which may be another machine's
            try:
                result, stat = Result.read(file), file.stat()
            except (OSError, ValueError):  # there is none, or its run will say what is wrong
                found.append((False, 0, Found(path, config, None)))
                continue
            written = (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
            found.append((here, stat.st_mtime_ns, Found(path, config, result, written)))
        return max(found, key=lambda item: item[:2], default=(False, 0, None))[2]

    def _matching(self, key: str, config: Mapping[str, Any]) -> list[Path]:
        train = config["train"]
        return [
            marker
            for marker in self._by_key.get(key, [])
            if train["threads"] in (None, self._markers[marker]["train"]["threads"])
            and train["device"] in ("auto", self._markers[marker]["train"]["device"])
            and marker.is_file()
        ]
