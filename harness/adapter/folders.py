"""Finds the folder of an adapter, and checks a folder that is to be written.

No torch: a mistake is told before the seconds that importing it takes.
"""

from collections.abc import Iterable
from pathlib import Path

from harness.words import did_you_mean

# The files of an adapter: what training needs to go on, and PEFT's.
NATIVE = ("native.json", "native.safetensors")
PEFT = ("adapter_config.json", "adapter_model.safetensors")


def adapter_folder(path: Path) -> Path:
    """The adapter's folder, from itself or from its run's. Raises ValueError if there is none."""
    if not path.is_dir():
        if path.exists():
            raise ValueError(f"{path} is a file; give a run's folder or an adapter's.")
        others = _runs(path.parent)
        raise ValueError(
            f"{path} is no folder; give a run's folder or an adapter's."
            f"{did_you_mean(path.name, others)}"
        )
    for folder in (path, path / "adapter"):
        if any((folder / name).is_file() for name in (NATIVE[0], PEFT[0])):
            return folder
    hint = ""
    if (path / "run.json").is_file():
        hint = ": the run in it is not finished, or failed"
    elif (path / "config.json").is_file():
        hint = ": it is a whole model, which transformers loads as it is"
    elif runs := _runs(path):
        hint = f": it holds runs, of which one is to be given, such as {path / runs[0]}"
    raise ValueError(f"{path} holds no adapter{hint}.")


def _runs(folder: Path) -> list[str]:
    """Names of the folders in there that are runs or adapters."""
    if not folder.is_dir():
        return []
    marks = ("run.json", f"adapter/{NATIVE[0]}", *NATIVE[:1], *PEFT[:1])
    names = (child.name for child in folder.iterdir() if any((child / m).is_file() for m in marks))
    return sorted(names)


def free_for_adapter(out: Path, *, replace: bool) -> Path:
    """`out`, absolute. Raises ValueError unless it is new or empty, or holds an exported adapter,
    and nothing else, that is to be replaced."""
    out, held = _held("--peft", out)
    if other := sorted(held - set(PEFT)):
        raise ValueError(
            f"{out} holds {other[0]}, which is not of an exported adapter, so it is not replaced; "
            "give another folder."
        )
    if held and not replace:
        raise ValueError(f"{out} holds an adapter; --replace writes it anew.")
    return out


def free_for_merged(out: Path, *, replace: bool) -> Path:
    """`out`, absolute. Raises ValueError unless it is new or empty, or a merge to be replaced."""
    out, held = _held("--merged", out)
    if held and not report_path(out).is_file():
        raise ValueError(
            f"{out} is not empty and holds no merge of ours (there is no {report_path(out).name} "
            "beside it), so it is not replaced; give another folder."
        )
    if held and not replace:
        raise ValueError(f"{out} holds an earlier merge; --replace writes it anew.")
    return out


def report_path(out: Path) -> Path:
    """The path of a merge's report: next to the merged folder, which holds nothing of ours."""
    return out.with_name(f"{out.name}.merge_report.json")


def _held(option: str, out: Path) -> tuple[Path, set[str]]:
    """`out`, absolute, and the names of what is in it."""
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{option} is {out}, which is a file; give a folder.")
    inside: Iterable[Path] = out.iterdir() if out.is_dir() else ()
    return out, {path.name for path in inside}
