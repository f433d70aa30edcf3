"""Questions of DeepMind's generator, made in a process of their own.

Saxton et al. 2019, "Analysing Mathematical Reasoning Abilities of Neural Models",
arXiv:1904.01557; the package mathematics-dataset (Apache-2.0). `arithmetic.py` runs this file with
a fixed PYTHONHASHSEED and reads the JSON that it prints, for three reasons: the generator iterates
over sets of strings, whose order differs between processes; it draws from three global generators;
and a part of sympy that has moved since 2019 must be put back where it looks for it.

    python arithmetic_questions.py '{"modules": ["arithmetic__mul"], "seed": 0, "train": 2, ...}'

train is the published train set's distribution with its easy, medium and hard thirds together, and
validation and test are the published `interpolate` set's.
"""

import hashlib
import json
import random
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from importlib import import_module
from typing import Any

import numpy as np

from harness.words import did_you_mean

SPLITS = ("test", "validation", "train")  # what an earlier one has, a later one leaves out
DRAWS_PER_ROW = 30  # before a module counts as exhausted

Question = tuple[str, str]  # with its answer


def samplers() -> dict[str, dict[str, Callable[[], Any]]]:
    """Finds, per split, each published module's function that draws a problem, by its name."""
    # Not "import ... as": under this name sympy.solvers has a function, which hides the module.
    outer: Any = import_module("sympy.solvers.diophantine")
    if not hasattr(outer, "base_solution_linear"):  # since sympy 1.6
        inner = import_module("sympy.solvers.diophantine.diophantine")
        outer.base_solution_linear = inner.base_solution_linear
    from mathematics_dataset.modules import modules

    def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Callable[[], Any]]]:
        for name, node in tree.items():
            if isinstance(node, dict):
                yield from flat(node, f"{prefix}{name}__")
            else:
                yield prefix + name, node

    interpolate = dict(flat(modules.test()))
    train = dict(flat(modules.train(lambda entropy_range: entropy_range)))
    return {"train": train, "validation": interpolate, "test": interpolate}


def check_modules(names: Collection[str], known: Collection[str]) -> None:
    """Raise ValueError unless each is a module of the package whose questions a seed repeats."""
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or " One is 'arithmetic__mul'."
            raise ValueError(f"task.modules: {name!r} is not a module of the generator.{hint}")
        if name.endswith("_composed"):
            # A composed question's parts are a set of objects without a hash of their own, whose
            # order is that of their addresses.
            raise ValueError(
                f"task.modules: {name} draws different questions in every process, whatever the "
                "seed; choose modules that are not composed."
            )


def seed_all(*key: object) -> None:
    """Seed the three generators that the package and sympy draw from."""
    import sympy.core.random

    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    sympy.core.random.seed(seed)


def draw(sample: Callable[[], Any], name: str, count: int, seen: set[str]) -> list[Question]:
    """`count` questions that are not in `seen`, to which they are added; none is as long as the
    package leaves out.

    Raises ValueError if the module does not run with the libraries here or has too few questions.
    """
    from mathematics_dataset.generate_settings import MAX_ANSWER_LENGTH, MAX_QUESTION_LENGTH

    rows: list[Question] = []
    for _ in range(DRAWS_PER_ROW * count):
        if len(rows) == count:
            break
        try:
            problem = sample()
        except Exception as error:  # whatever it is: the package is of 2019
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise ValueError(
                f"task.modules: {name} does not run with numpy {np.__version__} ({reason})."
            ) from error
        question, answer = str(problem.question), str(problem.answer)
        fits = len(question) <= MAX_QUESTION_LENGTH and len(answer) <= MAX_ANSWER_LENGTH
        if fits and question not in seen:
            seen.add(question)
            rows.append((question, answer))
    if len(rows) < count:
        raise ValueError(
            f"task.modules: {name} has fewer new questions than {count}; lower task.train_rows or "
            "task.eval_rows, or choose more modules."
        )
    return rows


def generate(request: dict[str, Any]) -> dict[str, list[Question]]:
    """Rows per split, the modules in turn. No question comes twice, in whatever split."""
    names, known = request["modules"], samplers()
    check_modules(names, known["train"])
    seen: set[str] = set()
    made: dict[str, list[Question]] = {}
    for split in SPLITS:
        by_module = []
        for i, name in enumerate(names):
            seed_all(request["seed"], split, name)
            count = len(range(i, request[split], len(names)))  # of rows i, i + modules, ...
            by_module.append(iter(draw(known[split][name], name, count, seen)))
        made[split] = [next(by_module[i % len(names)]) for i in range(request[split])]
    return made


def main() -> None:
    """Print the questions as JSON, or one sentence on stderr and exit code 1."""
    warnings.simplefilter("ignore")  # of 2019
    try:
        print(json.dumps(generate(json.loads(sys.argv[1]))))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
