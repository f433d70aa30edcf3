"""The record of a multirun: the keys that it swept, and the runs that it is made of. No torch.

It is outputs/<experiment>/multiruns/<name>.json and says what was asked for; a run's own folder
says how it went. The same command with other seeds takes its place. A run is recognised by its
config, whatever its folder is called.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.config.identity import irrelevant_removed, without
from harness.disk.digest import digest
from harness.disk.kinds import Count
from harness.disk.read import read_json, schema_of
from harness.disk.write import make_folder, write_text

FOLDER = "multiruns"
STUDY = "study"  # the name of a fair study's record: its runs are in study.yaml


@dataclass(frozen=True, kw_only=True)
class Member:
    """One run of a multirun.

    Args:
        values: swept key -> its value here, `seed` left out.
        asked: see `asked`.
        threads, device: as in the config; None and "auto" are settled when the run starts.
        run_dir: its folder, if that was given.
    """

    values: Mapping[str, Any]
    seed: int
    asked: str
    threads: int | None
    device: str
    run_dir: str | None = None

    def is_run(self, config: Mapping[str, Any]) -> bool:
        """True if the run of this config is the one that was asked for."""
        train = config["train"]
        return (
            self.threads in (None, train["threads"])
            and self.device in ("auto", train["device"])
            and self.asked == asked(config)
        )

    def __str__(self) -> str:
        return " ".join([*(f"{key}={value}" for key, value in self.values.items()),
                         f"seed={self.seed}"])  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Multirun:
    """The record of a multirun: its question, and the runs asked for.

    Args:
        started: the last time, in UTC, as text that sorts by time.
        keys: the swept keys in the order of the command line, `seed` left out.
        overrides: those that all runs share.
        inapplicable: jobs that were not started, since their variant lacks what was set.
    """

    name: str
    started: str
    command: str
    keys: Sequence[str] = ()
    overrides: Sequence[str] = ()
    inapplicable: int = 0
    members: Sequence[Member] = field(default_factory=list)

    def describe(self) -> str:
        """rank-4f3c2a (2026-11-30 02:12:05): rank, 9 runs"""
        keys = ", ".join(self.keys) or "seed"
        runs = f", {len(self.members)} runs" if self.members else ""
        return f"{self.name} ({self.started[:19].replace('T', ' ')}): {keys}{runs}"


_File = schema_of(
    Multirun,
    keys=list[str],
    overrides=list[str],
    inapplicable=Count,
    members=list[schema_of(Member)],  # type: ignore[misc]
)


def asked(config: Mapping[str, Any]) -> str:
    """Identifies the run that a resolved config asks for, wherever it is kept: its run key without
    the threads and the device, which a run may settle when it starts."""
    return digest(without(irrelevant_removed(config), ["train.threads", "train.device"]))


def record_name(keys: Sequence[str], asked_for: Any) -> str:
    """The same for the same command, whatever its seeds: variant-batch_size-4f3c2a."""
    words = [re.sub(r"[^\w]+", "_", key.rpartition(".")[2], flags=re.ASCII) for key in keys]
    return "-".join([*(words or ["seed"]), digest(asked_for)[:6]])[-80:].lstrip("-")


def write(folder: Path, record: Multirun) -> None:
    """Write a record into the folder of its runs, in the place of an earlier one of its name.
    OSError if the disk does not take it."""
    place = folder / FOLDER
    make_folder(place, "outputs_dir")
    write_text(place / f"{record.name}.json", json.dumps(asdict(record), indent=1) + "\n")


def read_all(folder: Path) -> list[Multirun]:
    """The records in a folder, the last started last. Raises ValueError for a damaged one."""
    found = []
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            fields = read_json(path, _File)
            members = [Member(**member) for member in fields.pop("members")]
            record = Multirun(**fields, members=members)
        except (ValueError, TypeError) as error:  # TypeError: a key too many or too few
            raise _no_record(path, str(error)) from None
        if record.name != path.stem:
            raise _no_record(path, f"it names itself {record.name}")
        if not all(set(member.values) == set(record.keys) for member in members):
            raise _no_record(path, "its members have other keys than it swept")
        found.append(record)
    return sorted(found, key=lambda record: record.started)


def _no_record(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is no record of a multirun ({reason.rstrip('.')}); the multirun's command writes "
        "it anew."
    )
