"""The rules of the house that no single module can keep: imports, targets, names, sizes."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
VARIANTS = sorted((ROOT / "variants").glob("*.py"))
HARNESS = sorted((ROOT / "harness").rglob("*.py"))
PLUGINS = sorted((ROOT / "hydra_plugins").rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
PYTHON = [*VARIANTS, *HARNESS, *PLUGINS, ROOT / "train.py"]
CONFIGS = sorted((ROOT / "conf").rglob("*.yaml"))
NAMES = sorted(file.stem for file in (ROOT / "conf/variant").glob("*.yaml"))


def relative(path):
    return path.relative_to(ROOT).as_posix()


@functools.cache
def nodes(path):
    """All nodes of a file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text())))


@functools.cache
def settings(path):
    """(key, leaf) of every leaf of a YAML file."""
    return list(values(yaml.safe_load(path.read_text())))


def imported(path):
    """Top-level packages that a file imports, wherever in it."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)} imports relatively"
            yield node.module.partition(".")[0]


def values(node, key=None):
    """(key, leaf) of every leaf of a YAML document."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from values(child, name)
    elif isinstance(node, list):
        for child in node:
            yield from values(child, key)
    else:
        yield key, node


# ---- structure ----------------------------------------------------------------------------------

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PYTHON
}


def arrows() -> dict[str, set[str]]:
    """Module -> the modules of this project that it imports, wherever in it."""
    found: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        asked: set[str] = set()
        for node in nodes(path):
            if isinstance(node, ast.Import):
                asked |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                asked |= (full & set(MODULES)) or {str(node.module)}
        found[name] = (asked & set(MODULES)) - {name}
    return found


def room(module: str) -> str:
    """A folder of harness/, or one of its loose files; variants, hydra_plugins, train."""
    return ".".join(module.split(".")[: 2 if module.startswith("harness.") else 1])


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Each room's floor: 1 where it imports no other. Raises CycleError for a circle."""
    found: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        found[name] = 1 + max((found[other] for other in graph.get(name, ())), default=0)
    return found


def test_imports_run_in_no_circle_and_rooms_stand_on_eleven_floors():
    modules = arrows()
    floors(modules)
    rooms: dict[str, set[str]] = {}
    for name, asked in modules.items():
        rooms.setdefault(room(name), set()).update({room(other) for other in asked} - {room(name)})
    assert max(floors(rooms).values()) <= 11, floors(rooms)


def test_the_run_fits_on_a_page_and_the_loop_is_a_third_of_it():
    tree = ast.parse((ROOT / "train.py").read_text())
    (run,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "run")
    (block,) = (node for node in run.body if isinstance(node, ast.With))
    (loop,) = (node for node in block.body if isinstance(node, ast.For))
    lines = int(run.end_lineno or 0) - run.lineno + 1
    loop_lines = int(loop.end_lineno or 0) - block.lineno + 1  # with what is opened for it
    assert lines <= 130 and 3 * loop_lines >= lines, (lines, loop_lines)


def test_four_files_of_the_harness_lie_loose():
    loose = sorted(path.name for path in (ROOT / "harness").glob("*.py"))
    assert loose == ["__init__.py", "cli.py", "tracking.py", "wandb_run.py", "words.py"]


def test_variants_stand_on_torch_alone():
    allowed = {"torch", "einops", "numpy", "variants"} | sys.stdlib_module_names
    found = {relative(path): set(imported(path)) - allowed for path in VARIANTS}
    assert not {name: others for name, others in found.items() if others}


def test_settings_arrive_as_plain_values():
    """Hydra's containers stay in train.py and the plugins; overrides.py has the names of
    keys from it, and build.py builds from plain values."""
    building = ("harness/config/build.py", "harness/config/overrides.py")
    for path in [*VARIANTS, *HARNESS]:
        found = set(imported(path))
        assert "omegaconf" not in found, path
        assert "hydra" not in found or relative(path) in building, path
        assert not re.search(r"\bDictConfig\b", path.read_text()), path


def test_targets_are_this_projects_or_torchs():
    found = [(path, value) for path in CONFIGS for key, value in settings(path)
             if key == "_target_"]  # fmt: skip
    assert len(found) > len(NAMES)
    for path, value in found:
        assert value.split(".")[0] in ("variants", "harness", "torch"), path


def test_no_module_without_a_subject():
    vague = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not [relative(path) for path in [*PYTHON, *TESTS] if path.stem in vague]


def test_a_variant_is_read_in_one_sitting():
    long = {relative(path): len(path.read_text().splitlines()) for path in VARIANTS}
    assert not {name: lines for name, lines in long.items() if lines > 380}


def test_a_docstring_begins_with_a_verb_or_the_things_name():
    questions = {"What", "Whether", "How", "Which", "Who", "Whose", "Why", "When", "Where"}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in [*PYTHON, *TESTS]:
        for node in nodes(path):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            assert not text or text.split()[0] not in questions, (path, text)


def test_nothing_is_unpickled():
    for path in PYTHON:
        assert not {"pickle", "dill", "joblib"} & set(imported(path)), path
        calls = {ast.unparse(node.func) for node in nodes(path) if isinstance(node, ast.Call)}
        assert not {"torch.load", "torch.save", "np.load", "numpy.load"} & calls, path


def test_no_path_of_a_machine_is_committed():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    machine = re.compile(r"(?<![\w.:/-])/(home|Users|root|work|mnt)/\w|\b[A-Z]:\\\\?Users")
    text = {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".jsonl", ".csv", ".tsv", ".html", ""}
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix in text:
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                if match := machine.search(line):
                    found.append(f"{name}:{number}: {line[match.start() :][:60]}")
    assert not found


# ---- no variant's name where every variant passes -----------------------------------------------
#
# A name in code is a branch waiting to happen. Docstrings and comments may cite a paper. Exempt:
# - the files that define a variant's classes: one builds on another (DoRA on LoRA's layer);
# - variants/__init__.py: its exports;
# - "full" and "head": ordinary words before they are names;
# - what is listed here, with its reason.

ORDINARY = {"full", "head"}
EXEMPT = {
    "harness/bench": "names the peers' methods that it times",
    "harness/models/quantised.py": "reads and writes another library's format, with two stores",
    "harness/adapter": "reads and writes another library's format, which has a type a method",
}


def classes():
    """Class -> file, for the classes that the YAMLs of variants name."""
    found = {}
    for file in (ROOT / "conf/variant").glob("*.yaml"):
        for key, value in settings(file):
            if key == "_target_":
                name = value.rpartition(".")[2]
                for path in VARIANTS:
                    if re.search(rf"^class {name}\b", path.read_text(), re.MULTILINE):
                        found[name] = path
    return found


CLASSES = classes()
OWN_FILES = {*CLASSES.values(), ROOT / "variants/__init__.py"}
POLICED = [
    path
    for path in PYTHON
    if path not in OWN_FILES and not any(relative(path).startswith(start) for start in EXEMPT)
]


def words(identifier):
    """AdaLoraLinear -> ada_lora_linear."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower()


NAMED = {*NAMES, *(name.lower() for name in CLASSES), *map(words, CLASSES), "ada_lora"} - ORDINARY
A_NAME = re.compile(rf"(?<![a-z0-9])({'|'.join(map(re.escape, sorted(NAMED)))})(?![a-z0-9])")


def named_in(text):
    """The variant or class that `text` names, or None. The project's own name is none."""
    found = A_NAME.search(re.sub(r"lora[-_]variants", "", text.lower()))
    return found and found[1]


def code(path):
    """(line, text) of each identifier and of each string but docstrings."""
    docstrings = set()
    for node in nodes(path):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings.add(node.lineno)
    strings = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.NAME:
                yield token.start[0], words(token.string)
            elif token.type in strings and token.start[0] not in docstrings:
                yield token.start[0], token.string


def test_the_classes_of_the_variants_are_found():
    assert {"LoraLinear", "DoraLinear", "AdaLoraLinear", "Nf4Store"} <= set(CLASSES)
    assert {relative(path) for path in POLICED} >= {
        "variants/layer.py",
        "variants/inject.py",
        "train.py",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora_B", "lora"),
        (words("AdaLoraLinear"), "ada_lora"),
        ("variant is 'dora'", "dora"),
        ("LoRA+", "lora"),
        ("lora-variants", None),
        ("floral", None),
        ("a full head", None),
    ],
)
def test_names_are_recognised(text, expected):
    assert named_in(text) == expected


def test_no_variant_is_named_where_every_variant_passes():
    found = [f"{relative(path)}, line {line}: {text}" for path in POLICED
             for line, text in code(path) if named_in(text)]  # fmt: skip
    assert not found


def test_no_variant_is_named_by_another_choice():
    for path in CONFIGS:
        if not relative(path).startswith(("conf/variant/", "conf/experiment/")):
            default = {"lora"} if path.name == "config.yaml" else set()  # defaults: variant
            named = {str(value) for _, value in settings(path) if named_in(str(value))}
            assert not named - default, path


def test_a_variant_is_named_by_its_own_file():
    for name in NAMES:
        file = ROOT / f"conf/variant/{name}.yaml"
        assert yaml.safe_load(file.read_text())["name"] == name
