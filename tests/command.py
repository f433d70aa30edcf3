"""Run train.py's command line inside the test process, on small local files."""

import csv
import io
import json
import random
import sys
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra

import train

WORDS = {
    "good": ["fine", "warm", "bright", "moving", "sharp", "lovely"],
    "bad": ["dull", "cold", "flat", "tedious", "clumsy", "grim"],
}


def write_task(folder: Path, rows: int = 48) -> list[str]:
    """Three CSV files of a two-class task; returns the overrides that choose them."""
    draw = random.Random(0)
    overrides = ["task=local", "task.max_tokens=40"]
    for split, count in (("train", rows), ("validation", 12), ("test", 14)):
        path = folder / f"{split}.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for index in range(count):
                label = ("good", "bad")[index % 2]
                words = draw.choices(WORDS[label], k=draw.randint(1, 5))
                writer.writerow([f"a {' '.join(words)} film {split} {index}", label])
        overrides.append(f"task.files.{split}={path}")
    return overrides


class Captured:
    """Holds what was printed, without a fixture."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.out, self.err = io.StringIO(), io.StringIO()
        patch.setattr(sys, "stdout", self.out)
        patch.setattr(sys, "stderr", self.err)

    def readouterr(self):
        said = self.out.getvalue(), self.err.getvalue()
        for stream in (self.out, self.err):  # once
            stream.seek(0)
            stream.truncate()
        return said


class CommandLine:
    """`python train.py ...` on the tiny model, with outputs under `root`."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys):
        self.root, self.monkeypatch, self.capsys = root, monkeypatch, capsys
        self.out = self.err = ""
        data = root / "data"
        data.mkdir()
        self.defaults = [
            "model=tiny",
            "tracking=none",
            "train.steps=8",
            "train.batch_size=4",
            "train.eval_every=4",
            "train.log_every=2",
            "train.checkpoint_every=2",
            "train.threads=1",
            f"outputs_dir={root / 'outputs'}",
            *write_task(data),
        ]

    def __call__(self, *overrides: str) -> int:
        """The exit code; what was printed is in `out` and `err`."""
        given = {override.partition("=")[0] for override in overrides}
        defaults = [d for d in self.defaults if d.partition("=")[0] not in given]
        if "-m" in given and "hydra/launcher" not in given:
            defaults.append("hydra/launcher=basic")  # jobs in this process
        arguments = [*(o for o in overrides if o.startswith("-")), *defaults]
        arguments += [o for o in overrides if not o.startswith("-")]
        return self.exactly(*arguments)

    def exactly(self, *arguments: str) -> int:
        """As it is typed, without this file's defaults."""
        GlobalHydra.instance().clear()
        self.monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        # Hydra composes all once more to ask for a hydra.mode, which no file of conf/ has.
        self.monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: None)
        code: int | str | None = 0
        try:
            train.command()
        except SystemExit as stop:
            code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
        self.out, self.err = self.capsys.readouterr()
        return code or 0

    def folders(self) -> list[Path]:
        return sorted(path.parent for path in (self.root / "outputs").rglob("run.json"))

    def result(self, folder: Path | None = None) -> dict:
        folder = folder or self.folders()[-1]
        return json.loads((folder / "result.json").read_text())
