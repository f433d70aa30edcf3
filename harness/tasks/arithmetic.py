"""School mathematics with exact answers, by DeepMind's generator (Saxton et al. 2019).

    pip install -e ".[arithmetic]"
    python train.py task=arithmetic model=smollm2

Train has the difficulty of the published train set; validation and test have that of the published
interpolate set. No question comes twice, so that none of test is in train. The seed of the
questions is fixed, but what it gives depends on the versions of numpy and sympy: what identifies
the data is the fingerprint of the questions themselves, not the seed. See arithmetic_questions.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from harness.disk import cache
from harness.disk.digest import digest
from harness.disk.inputs import package_version
from harness.disk.read import check, parse_json
from harness.tasks.language import LanguageModelling
from harness.tasks.rows import check_counts
from harness.tasks.turns import Row
from variants.settings import check_type

PACKAGE = "mathematics_dataset"
GENERATOR = Path(__file__).with_name("arithmetic_questions.py")
SEED = 0  # of the questions, whatever the run's: all seeds learn from the same data


class _Kept(TypedDict):
    """The questions that an earlier process has made."""

    sha256: str
    questions: dict[str, list[list[str]]]


def make_questions(modules: Sequence[str], train_rows: int, eval_rows: int) -> dict[str, list[Row]]:
    """The rows of train, validation and test; the module of row i is modules[i % len(modules)].
    What an earlier process has made is read from `harness.disk.cache`.

    Raises ValueError if the package is missing, or if a module is unknown, cannot be repeated, does
    not run here or has too few questions.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError('task=arithmetic needs the generator: pip install -e ".[arithmetic]".')
    request = {"modules": list(modules), "seed": SEED, "train": train_rows,
               "validation": eval_rows, "test": eval_rows}  # fmt: skip
    file = cache.folder() / f"questions-{_digest(request)[:16]}.json"
    try:
        kept = check(_Kept, parse_json(cache.read(file) or b"", str(file)), str(file))
        made, intact = kept["questions"], kept["sha256"] == digest(kept["questions"])
    except (OSError, ValueError):
        intact = False
    if not intact:
        made = _made(request)
        kept = {"sha256": digest(made), "questions": made}
        cache.write(file, json.dumps(kept).encode())
    rows = {
        split: [
            Row(i, (("user", question), ("assistant", f" {answer}")))
            for i, (question, answer) in enumerate(questions)
        ]
        for split, questions in made.items()
    }
    trained = {row.turns[0] for row in rows["train"]}
    assert not any(row.turns[0] in trained for row in rows["validation"] + rows["test"])
    return rows


def _digest(request: Mapping[str, Any]) -> str:
    """Digests all that the questions depend on."""
    packages = ("numpy", "sympy", "mathematics-dataset")
    versions = {"python": sys.version_info[:2]} | {n: package_version(n) for n in packages}
    return digest({"request": request, "code": GENERATOR.read_text(), "versions": versions})


def _made(request: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Questions and answers by split, from the generator's own process."""
    done = subprocess.run(
        # -P: the folder of the file, full of ordinary names, is no place to import from
        [sys.executable, "-P", str(GENERATOR), json.dumps(request)],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError((done.stderr.strip() or "the generator was stopped.").splitlines()[-1])
    made: dict[str, list[tuple[str, str]]] = json.loads(done.stdout)
    return made


class Arithmetic(LanguageModelling):
    """`task=arithmetic`.

    Args:
        modules: of the package, as <area>__<module>; those named _composed cannot be repeated.
        train_rows, eval_rows: how many questions to train on, and to validate and to test on, the
            modules in turn.
        settings: see `LanguageModelling`.

    Raises ValueError on what `make_questions` refuses.
    """

    def __init__(
        self, modules: Sequence[str], *, train_rows: int = 4000, eval_rows: int = 250,
        **settings: Any,
    ):  # fmt: skip
        check_type("modules", modules, list)
        for name in modules:
            check_type("modules", name, str)
        if not modules or len(set(modules)) < len(modules):
            raise ValueError(f"modules is {modules}; it must hold at least one, each once.")
        check_counts(train_rows=train_rows, eval_rows=eval_rows)
        self.modules = tuple(modules)
        rows = make_questions(modules, train_rows, eval_rows)
        versions = " and ".join(f"{name} {package_version(name)}" for name in ("numpy", "sympy"))
        notes = [f"made with {versions}, on which the questions depend"]
        super().__init__("arithmetic", rows, notes=notes, **settings)

    def score(self, answer: str, row: Row) -> dict[str, Any]:
        """Judges whether the answer is right, and says whose question it was."""
        return super().score(answer, row) | {"module": self.modules[row.id % len(self.modules)]}
