"""A run's folder: what it holds, how it is written, and that nothing is ever overwritten unasked.

    config.yaml  environment.json  metrics.jsonl  predictions.jsonl  result.json  adapter/

Whole files are written to a temporary name and renamed; metrics.jsonl grows by a line at a time.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def to_json(value: Any) -> Any:
    """`value` with what JSON lacks (NaN, infinities) as null."""
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class RunFolder:
    """One run's folder. Nothing is written before `create`.

    Args:
        path: need not exist.
        key: the run key; a folder that holds another run's raises ValueError.
        force: let `create` remove what is there.
    """

    def __init__(self, path: Path, key: str, *, force: bool = False):
        self.path, self.key, self.force = path, key, force
        self.marker = path / "run.json"
        if path.exists() and not path.is_dir():
            raise ValueError(f"run_dir {path} is a file; give a folder.")
        if self.marker.is_file():
            found = json.loads(self.marker.read_text())["run_key"]
            if found != key and not force:
                raise ValueError(
                    f"{path} holds a run with other settings; give another run_dir, or force=true "
                    "to replace it."
                )
        elif path.exists() and any(path.iterdir()):
            raise ValueError(
                f"{path} is not empty and is not a run's folder; give another run_dir."
            )

    def create(self, config: Mapping[str, Any]) -> None:
        """Make the folder, or empty it if forced; what an interrupted run left stays."""
        if self.force and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.marker, json.dumps({"run_key": self.key, "config": config}) + "\n")

    def result(self) -> dict[str, Any] | None:
        """The finished run's result, or None."""
        path = self.path / "result.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def write_json(self, name: str, value: Any) -> None:
        write_atomic(self.path / name, json.dumps(to_json(value), indent=2) + "\n")

    def write_lines(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        write_atomic(self.path / name, "".join(json.dumps(to_json(row)) + "\n" for row in rows))

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(row)) + "\n")

    def history(self, up_to: int) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl up to a step, dropping the later ones (and a half line) for
        good: what a resumed run logs again must not appear twice."""
        path = self.path / "metrics.jsonl"
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # killed while writing it
                break
            if row["step"] > up_to:
                break
            rows.append(row)
        if path.is_file():
            self.write_lines("metrics.jsonl", rows)
        return rows
