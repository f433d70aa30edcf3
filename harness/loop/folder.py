"""A run's folder: what it holds, how it is written, and that nothing is ever overwritten unasked.

    run.json (which run this is)  config.yaml  environment.json  metrics.jsonl  checkpoints/
    predictions.jsonl  samples.jsonl  adapter/
    result.json (written last: a folder that has it is finished)

Whole files are written to a temporary name and renamed; metrics.jsonl grows by a line at a time.
A process that writes here holds a lock, which the system drops when it ends, however it ends.
"""

import contextlib
import json
import re
import shutil
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from harness.config.identity import Identity
from harness.config.settings import Settings
from harness.disk import inputs as files_read
from harness.disk import locks
from harness.disk.read import read_json
from harness.disk.write import make_folder, remove_leftovers, to_json, write_text
from harness.loop.result import Marked, Result, read_row
from harness.machine import distributed
from harness.models.fingerprint import differences
from harness.tasks.base import Task
from harness.tasks.batch import Evaluation

_NAMES = r"(run|environment|result)\.json|config\.yaml|(metrics|predictions|samples)\.jsonl"


class RunFolder:
    """One run's folder. Nothing is written before `create`.

    Args:
        path: need not exist.
        key: the run key; a folder that holds another run's raises ValueError.
        fingerprints: of data, base, tokenizer and the base's function; if they have changed since,
            ValueError. A folder of before there were fingerprints of functions has none to compare.
        definition: of the base, which the last of them is a digest of.
        force: let `create` remove what is there.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        fingerprints: Mapping[str, str],
        *,
        definition: Mapping[str, Any] | None = None,
        force: bool = False,
    ):
        self.path, self.key, self.fingerprints, self.force = path, key, dict(fingerprints), force
        self.definition, self.inputs = definition, None
        self.run_id = uuid.uuid4().hex[:16]  # of the W&B run
        self.marker, self.checkpoints = path / "run.json", path / "checkpoints"
        self._found = _identity(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"run_dir {path} is a file; give a folder.")
        # In this order: another process may be writing the marker now.
        foreign = path.exists() and not all(map(_half_written, path.iterdir()))
        if self.marker.is_file():
            if force:
                return
            try:
                found: dict[str, Any] = {**read_json(self.marker, Marked, nonfinite=True)}
            except ValueError as error:
                raise _replaceable(error) from None
            if missing := {"run_key", "fingerprints", "run_id"} - set(found):
                raise ValueError(
                    f"{self.marker} has no {', '.join(sorted(missing))}: another version of this "
                    "project began it; give another run_dir, or force=true to replace it."
                )
            if found["run_key"] != key:
                raise ValueError(
                    f"{path} holds a run with other settings; give another run_dir, or force=true "
                    "to replace it."
                )
            self._refuse_changed(found)
            self.run_id, self.inputs = found["run_id"], found.get("inputs")
        elif foreign:
            raise ValueError(
                f"{path} is not empty and is not a run's folder; give another run_dir."
            )

    def _refuse_changed(self, found: Mapping[str, Any]) -> None:
        was = found["fingerprints"] if isinstance(found["fingerprints"], Mapping) else {}
        changed = [
            name
            for name, value in self.fingerprints.items()
            if was.get(name, value if name == "function" else None) != value
        ]
        if not changed:
            return
        parts = ["function of the base" if name == "function" else name for name in changed]
        how = ""
        if "function" in changed:
            phrases = differences(self.definition, found.get("definition"))
            how = f" ({'; '.join(phrases[:3])})"
        raise ValueError(
            f"the {' and the '.join(parts)} changed since {self.path} was begun{how}; give another "
            "run_dir, or force=true to replace it."
        )

    def create(self, config: Mapping[str, Any], inputs: Mapping[str, Any] | None = None) -> None:
        """Make the folder, or empty it if forced; what an interrupted run wrote whole stays.

        Args:
            inputs: what was read, as `harness.disk.inputs.record` gives it.

        All processes wait for it.

        Raises Busy if another process is writing there, or has finished the run meanwhile, and
        ValueError if another folder has taken its place.
        """
        make_folder(self.path, "run_dir or outputs_dir")
        if self._found not in (None, _identity(self.path)) or (
            self._found is None and self.path.is_symlink()
        ):
            raise ValueError(f"{self.path} is another folder than it was a moment ago.")
        unlock = weakref.finalize(self, locks.take(self.path))
        result = self.path / "result.json"
        if result.is_file() and not self.force:
            unlock()
            raise locks.Busy(f"another process has finished {self.path} meanwhile.")
        result.unlink(missing_ok=True)  # first: what is half removed is no finished run
        for child in self.path.iterdir() if self.force else ():
            if child.name == locks.FILE:
                continue
            if child.is_dir() and not child.is_symlink():
                shutil.rmtree(child)
            elif child != self.marker:  # replaced below: the folder is ours all the time
                child.unlink()
        remove_leftovers(self.path, _NAMES)
        about = {
            "run_key": self.key,
            "fingerprints": self.fingerprints,
            "definition": self.definition,
            "run_id": self.run_id,
            "inputs": inputs,
        }
        write_text(self.marker, json.dumps({**about, "config": config}) + "\n")
        distributed.wait()

    def read_again(self, inputs: Mapping[str, Any] | None) -> None:
        """Note, as far as the disk takes it, what has been read and found to be what it was when
        the finished run was begun: launchers need not start it to learn that."""
        with contextlib.suppress(OSError, ValueError):
            write_text(
                self.marker,
                json.dumps({**read_json(self.marker, dict, nonfinite=True), "inputs": inputs})
                + "\n",
            )

    def result(self) -> Result | None:
        """The finished run's result, or None; None if it is to be replaced. Raises ValueError if it
        is damaged."""
        path = self.path / "result.json"
        if self.force or not path.is_file():
            return None
        try:
            return Result.read(path)
        except ValueError as error:
            raise _replaceable(error) from None

    def finished(
        self, read: Callable[[], Mapping[str, Any] | None], *, keep_checkpoints: bool
    ) -> Result | None:
        """The result of a run that was finished earlier, after saying so; None if it is to be made.

        Args:
            read: makes the record of what was read now, for `read_again`.

        Raises ValueError if that run failed, or the processes disagree.
        """
        done = self.result()
        distributed.agree(
            run_key=self.key, fingerprints=self.fingerprints, finished=done is not None
        )
        if done is None:
            return None
        print(f"{self.path} is {done['status']} already (force=true runs it again)\n")
        if files_read.changed(self.inputs, times=False):  # but not what is made of it
            self.read_again(read())
        if done["status"] == "failed":
            raise ValueError(done["reason"])
        if not keep_checkpoints:
            self.remove_checkpoints()  # killed before it could
        return done

    def view(self, up_to: int) -> dict[str, Any]:
        """The arguments of `NoTracker.open` that show this folder's run up to a step."""
        about = {"run_dir": self.path, "run_id": self.run_id, "name": self.path.name}
        return {**about, "history": self.history(up_to)}

    def describe(self, config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Write what was asked for, and where it is computed."""
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        self.write_text("config.yaml", text)
        self.write_json("environment.json", environment)

    def write_predictions(self, scores: Mapping[str, Evaluation], task: Task) -> list[Any]:
        """Write each row's prediction, and some of the last split for a human; those."""
        rows = [{"split": s, **row} for s, score in scores.items() for row in score.predictions]
        self.write_lines("predictions.jsonl", rows)
        split = list(scores)[-1]
        samples = task.samples(split, scores[split].predictions)[:50]
        self.write_lines("samples.jsonl", samples)
        return samples

    def finish(self, result: Mapping[str, Any], *, keep_checkpoints: bool) -> None:
        """Write the result, last: a folder that has it is finished."""
        self.write_json("result.json", result)
        if not keep_checkpoints:
            self.remove_checkpoints()

    def remove_checkpoints(self) -> None:
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    @contextlib.contextmanager
    def recording_failure(
        self, result: Mapping[str, Any], kinds: tuple[type[Exception], ...]
    ) -> Iterator[None]:
        """On an exception of these kinds, write a result with status failed and its reason."""
        try:
            yield
        except kinds as error:
            reason = {"status": "failed", "failure": type(error).__name__, "reason": str(error)}
            self.write_json("result.json", {**result, **reason})
            raise

    def write_text(self, name: str, text: str) -> None:
        write_text(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(to_json(value), indent=2) + "\n")

    def write_lines(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.write_text(name, "".join(json.dumps(to_json(row)) + "\n" for row in rows))

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl. OSError if it cannot be written."""
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(to_json(row)) + "\n")
        except OSError as error:
            raise OSError(f"{path} could not be written: {error.strerror}.") from error

    def history(self, up_to: int) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl up to a step, dropping the later ones (and a half line) for
        good: what a resumed run logs again must not appear twice. Raises ValueError if a line
        before the last is damaged."""
        path = self.path / "metrics.jsonl"
        rows: list[dict[str, Any]] = []
        lines = path.read_bytes().splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            row = read_row(line)
            if row is None and number < len(lines):
                raise ValueError(f"{path}, line {number} is damaged; force=true runs it all again.")
            if row is None or row["step"] > up_to:  # None: killed while writing it
                break
            rows.append(row)
        if path.is_file():
            self.write_lines("metrics.jsonl", rows)
        return rows


# ---- reading what may be damaged -----------------------------------------------------------------


def _identity(path: Path) -> tuple[int, int] | None:
    """Finds the folder, and its disk, that a path leads to; None if to none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _replaceable(error: ValueError) -> ValueError:
    """The same error, with the way out."""
    return ValueError(f"{str(error).rstrip('.')}; force=true replaces it.")


def _half_written(path: Path) -> bool:
    """Tell whether a name is of our first files, under its temporary name."""
    ours = re.fullmatch(r"\.run\.json\.\d+", path.name) and path.is_file()
    return path.name == locks.FILE or bool(ours)


@contextlib.contextmanager
def folder_to_write(path: Path) -> Iterator[Path]:
    """`path` for the first process; for the others, who may have to help with what is written, one
    that is thrown away."""
    if distributed.is_first():
        yield path
    else:
        with tempfile.TemporaryDirectory() as thrown_away:
            yield Path(thrown_away)


class ReadOnlyFolder(RunFolder):
    """The run's folder for all processes but the first: they look and leave all as it is."""

    def create(self, config: Mapping[str, Any], inputs: Mapping[str, Any] | None = None) -> None:
        """Wait for the first process, which may remove what is there."""
        distributed.wait()

    def read_again(self, inputs: Mapping[str, Any] | None) -> None: ...

    def log(self, row: Mapping[str, Any]) -> None: ...

    @contextlib.contextmanager
    def recording_failure(
        self, result: Mapping[str, Any], kinds: tuple[type[Exception], ...]
    ) -> Iterator[None]:
        """All processes fail in these ways together: leave the first one time to record it, since
        torchrun ends it as soon as one has ended."""
        try:
            yield
        except kinds:
            give_up = time.monotonic() + 60
            while time.monotonic() < give_up and not distributed.others_have_failed():
                time.sleep(0.1)
            raise

    def write_text(self, name: str, text: str) -> None: ...

    def remove_checkpoints(self) -> None: ...


def open_folder(settings: Settings, identity: Identity, experiment: str) -> RunFolder:
    """The folder of a run, for the first process to write and the others to read.

    Args:
        experiment: names the folder of runs, unless the run has a `run_dir` of its own.
    """
    named = Path(settings.outputs_dir, experiment, identity.name)
    kind = RunFolder if distributed.is_first() else ReadOnlyFolder
    return kind(
        Path(settings.run_dir) if settings.run_dir else named,
        identity.run_key,
        identity.fingerprints,
        definition=identity.definition,
        force=settings.force,
    )
