"""The constants of a run, and their proof: streams, fingerprints, environment."""

import functools
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from harness.disk.digest import digest
from harness.disk.inputs import ROOT, code_of_runs

CODE = ("variants", "harness", "hydra_plugins", "conf", "train.py", "pyproject.toml")


@functools.cache
def default_threads() -> int:
    """As many CPU threads as torch took at the start, whatever an earlier job has set."""
    return torch.get_num_threads()


def resolve_device(
    device: str, dtypes: Sequence[str], *, setting: str = "train.device"
) -> torch.device:
    """`auto` is CUDA if there is one. Raises ValueError, naming the setting that `device` is from,
    for one that is missing or cannot compute in one of `dtypes`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"{setting} is {device!r}; it must be auto, cpu, cuda or cuda:n."
        ) from None
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"{setting} is {device!r}; it must be auto, cpu, cuda or cuda:n.")
    if resolved.type == "cuda":
        count = torch.cuda.device_count()
        if (resolved.index or 0) >= count:
            raise ValueError(f"{setting} is {device!r}, but this machine has {count} CUDA devices.")
        if "bfloat16" in dtypes and not torch.cuda.is_bf16_supported():
            raise ValueError(
                f"{torch.cuda.get_device_name(resolved)} has no bfloat16; use float32."
            )
    return resolved


def float16_instead(config: dict[str, Any], device: torch.device) -> list[str]:
    """Put float16 in the place of bfloat16, in the config, on a card that only emulates bfloat16:
    those before Ampere, such as a T4. Returns the sentence that says so, if anything was put."""
    if device.type != "cuda" or not emulates_bfloat16(device):
        return []
    keys = (("train", "compute_dtype"), ("model", "dtype"))
    wanted = [(part, key) for part, key in keys if config[part].get(key) == "bfloat16"]
    for part, key in wanted:
        config[part][key] = "float16"
    named = " and ".join(f"{part}.{key}" for part, key in wanted)
    card = torch.cuda.get_device_name(device)
    return [f"{card} has no bfloat16: {named} is float16, and the loss is scaled."] * bool(wanted)


def emulates_bfloat16(device: torch.device) -> bool:
    """True of a CUDA device whose units compute float16 but no bfloat16."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 8


def environment(threads: int, device: torch.device) -> dict[str, Any]:
    """The causes of a result besides its config: software, hardware, kernels, this code's state.

    Holds no environment variables but the few named here.
    """
    packages = ["torch", "transformers", "tokenizers", "numpy", "hydra-core", "wandb",
                "safetensors", "einops"]  # fmt: skip
    changed = git("status", "--porcelain", "--", *CODE)
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "libraries": _libraries(),
        "device": str(device),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "code": digest(code_of_runs()),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changed is None else bool(changed),
    }


def git(*arguments: str) -> str | None:
    """Ask git about this code; None outside a checkout, or on a machine without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _libraries() -> str:
    """Those with the kernels that torch calls, with their versions."""
    lines = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    kinds = ("Math Kernel Library", "MKL-DNN", "OpenMP", "CUDA Runtime", "CuDNN", "Magma")
    return "; ".join(line for line in lines if any(kind in line for kind in kinds))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
