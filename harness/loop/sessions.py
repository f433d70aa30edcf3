"""By which machine and code a run was computed: one session for each change while it was underway.

A checkpoint keeps the sessions of the steps before it. A run that would go on from it in another
environment is refused, since its result would be that of neither; `train.resume=anyway` goes on,
and the result lists both. Compared is what numbers depend on: packages, kernels, processor, and the
code that a run executes. Linux's version, documents and the number of processes are not.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from harness.disk.inputs import code_of_runs

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "safetensors", "einops")
_MACHINE = ("python", "processor", "threads", "cpu_capability", "libraries", "device",
            "accelerator", "matmul_precision", "attention")  # fmt: skip

Session = Mapping[str, Any]


def now(environment: Mapping[str, Any]) -> Session:
    """The session that this process begins, with `harness.machine.hardware.environment`."""
    return {"environment": dict(environment), "code": dict(code_of_runs())}


def continued(
    saved: Mapping[str, Any] | None, current: Session, resume: str, path: Any
) -> list[Session]:
    """The sessions of a run: those of its checkpoint, and the current one if it is another.

    Args:
        saved: the checkpoint's state, None if there is none.
        resume: train.resume.
        path: of the run, for the message.

    Raises ValueError if it is another, unless to resume anyway.
    """
    if saved is None:
        return [{"after_step": 0, **current}]
    before: list[Session] = saved["sessions"]
    differ = differences(before[-1], current)
    if not differ:
        return before
    if resume != "anyway":
        raise ValueError(
            f"{path} was interrupted after step {saved['step']} in another environment "
            f"({'; '.join(differ)}); go on in that one, or give train.resume=anyway, which the "
            "result will say, or force=true to run it all again."
        )
    return [*before, {"after_step": saved["step"], **current}]


def differences(before: Session, after: Session) -> list[str]:
    """The differences of two sessions that numbers depend on: "torch is 2.14.0, was 2.13.0"."""
    was, is_ = _relevant(before["environment"]), _relevant(after["environment"])
    found = [
        f"{key} is {is_.get(key)}, was {was.get(key)}"
        for key in dict.fromkeys([*was, *is_])
        if was.get(key) != is_.get(key)
    ]
    old, new = before["code"], after["code"]
    if files := sorted(file for file in {*old, *new} if old.get(file) != new.get(file)):
        more = f" and {len(files) - 3} more files" if files[3:] else ""
        commits = [str(s["environment"]["commit"])[:8] for s in (before, after)]
        at = f" between the commits {' and '.join(commits)}" if commits[0] != commits[1] else ""
        found.append(f"the code differs in {', '.join(files[:3])}{more}{at}")
    return found


def in_result(sessions: Sequence[Session]) -> dict[str, Any]:
    """The part of a result on its sessions: empty if there was one."""
    if len(sessions) == 1:
        return {}
    told = [{"after_step": sessions[0]["after_step"], "environment": sessions[0]["environment"]}]
    for before, after in pairwise(sessions):
        differ = differences(before, after)
        told.append({**{k: after[k] for k in ("after_step", "environment")}, "differs": differ})
    return {"sessions": told}


def _relevant(environment: Mapping[str, Any]) -> dict[str, Any]:
    packages = environment["packages"]
    libc = str(environment["platform"]).rpartition("-with-")[2]  # the kernel computes nothing
    return {
        **{name: packages.get(name) for name in _PACKAGES},
        **{key: environment.get(key) for key in _MACHINE},
        "libc": libc,
    }
