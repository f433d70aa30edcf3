"""The README's own code runs as printed."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_loop_in_the_readme_runs_and_learns():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec("import torch; torch.manual_seed(0)\n" + code, names)
    assert names["loss"] < 1.3  # ln 4 = 1.386 at the start


def test_the_tree_lists_every_file_of_the_subject():
    root = Path(__file__).parent.parent
    for file in (root / "variants").glob("*.py"):
        assert file.name == "__init__.py" or file.name in README, file.name
