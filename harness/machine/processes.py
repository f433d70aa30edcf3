"""Starts processes that never outlive this one, quickly.

No process of a job is left when this process ends, however it ends. On Linux the kernel
kills a job when its parent dies (prctl, PR_SET_PDEATHSIG). Everywhere but on Windows each job leads
a session of its own, and a watcher, for which the end of this process is the end of a pipe, kills
what is left of the jobs' process groups: their children too.

Importing torch, transformers and wandb takes longer than some jobs do. So, on Linux, a `Template`
imports them once, and each job that is a Python program is a fork of it. The standard library's
forkserver does not do: its processes outlive a parent that is killed, run no atexit functions, end
without an exit code when the server dies, and its preload cannot be changed.
"""

import contextlib
import ctypes
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

LINUX = sys.platform.startswith("linux")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Process(Protocol):
    """A job's process; it leads a process group."""

    pid: int
    returncode: int | None  # None until `poll` or `wait` has seen its end; -n after signal n

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


def program() -> list[str]:
    """The interpreter and script, or -m module, that this process was started with."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.origin == sys.argv[0]:
        return [sys.executable, "-m", spec.name.removesuffix(".__main__")]
    return [sys.executable, sys.argv[0]]


def exit_reason(code: int) -> str:
    """Names the signal or the code that a process ended with."""
    if code >= 0:
        return f"exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    guess = ", perhaps out of memory" if -code == 9 else ""
    return f"killed by signal {-code} ({names.get(-code, 'unknown')}){guess}"


def signal_group(process: Process, name: str) -> None:
    """Signal a process and its children; no error if all have ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, getattr(signal, name))
        elif process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)  # Windows: ends it at once


# ---- a process of its own ------------------------------------------------------------------------

# Becomes the job after it has asked to be killed with its parent. That happens when the *thread*
# that started it ends, so jobs are started by the thread that waits for them.
_MORTAL = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, signal.SIGKILL, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):  # or the parent died before
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def _mortal(command: Sequence[str]) -> list[str]:
    """The command, killed when its parent dies; unchanged where there is no prctl."""
    if not LINUX:
        return [*command]
    return [sys.executable, "-I", "-S", "-c", _MORTAL, str(os.getpid()), *command]


def start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen:
    """Start a command; all that it prints is appended to `log`. OSError if it cannot be started."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            _mortal(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True,  # a terminal's Ctrl-C is for this process alone
        )


# ---- a fork of a template ------------------------------------------------------------------------


class Forked:
    """A job that is a fork of the template. Its first parent has ended, so its parent is this
    process, the subreaper."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        code = self._reap(0)
        assert code is not None
        return code


class Template:
    """A process that has imported `modules` and becomes jobs by forking; Linux only.

    A fork behaves as a process started anew, except for the variables that the imported libraries
    read when they are loaded (for OMP_NUM_THREADS, `torch.set_num_threads` still counts).
    A module that cannot be imported, or a template that has died, is no error: `start`
    then starts processes anew, and they will say what is wrong.
    """

    def __init__(self, modules: Sequence[str]):
        self.modules = modules
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Template":
        if LINUX and self.modules:
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            self._process = subprocess.Popen(
                # -P: the folder of this file is no place to import from
                _mortal([sys.executable, "-P", __file__]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},  # of every fork, and nothing printed
                start_new_session=True,  # while importing is left in a buffer for them to repeat
                text=True,
            )
            self._ask({"parent": os.getpid(), "path": sys.path, "modules": [*self.modules]})
        return self

    def __exit__(self, *exception) -> None:
        if self._process is not None:
            self._process.communicate()  # the end of its input ends it
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def _ask(self, request: object) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(request), file=self._process.stdin, flush=True)

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
        """As the function `start`; quicker if the command is this interpreter with a script, or
        with -m and a module."""
        program, first = command[0], command[1] if len(command) > 1 else "-"
        ours = program == sys.executable and (first == "-m" or not first.startswith("-"))
        if self._process is not None and self._process.stdout is not None and ours:
            self._ask([[*command[1:]], dict(environment), str(log.absolute()), os.getcwd()])
            if pid := int(self._process.stdout.readline() or 0):
                return Forked(pid)
        return start(command, environment, log)


def _serve() -> list[str]:
    """Run the template: answer each line that asks for a job with the job's process id, or with 0
    if it cannot fork. In a job it returns the job's arguments; the template itself ends in here."""
    first, answers = json.loads(sys.stdin.readline()), os.dup(1)
    os.dup2(2, 1)  # what an import prints is no answer
    sys.path[:] = first["path"]
    for module in first["modules"]:
        importlib.import_module(module)
    for line in sys.stdin:
        if (between := os.fork()) == 0:
            between = os.getpid()
            try:
                job = os.fork()
            except OSError:
                os.write(answers, b"0\n")
                os._exit(1)
            if job:
                os._exit(0)
            while os.getppid() == between:  # until the pool has it
                time.sleep(0.0005)
            return _become(first["parent"], answers, *json.loads(line))
        os.waitpid(between, 0)
    sys.exit(0)


def _become(
    parent: int, answers: int, arguments: list[str], environment: dict, log: str, cwd: str
) -> list[str]:
    """Make this process, forked from the template, what `start` would have started."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has died before
        os._exit(1)
    os.write(answers, b"%d\n" % os.getpid())
    os.close(answers)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    os.environ.update(environment)
    os.chdir(cwd)
    return arguments


def _go_on_as(arguments: list[str]) -> None:
    """Runs the rest of `python *arguments` after its start."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


# ---- the watcher ---------------------------------------------------------------------------------

_WATCHER = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


class Watcher:
    """Kills the process groups that it watches when this process has ended, however it did."""

    def __enter__(self) -> "Watcher":
        self._process = None
        if hasattr(os, "killpg"):
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _WATCHER],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                text=True,
            )
        return self

    def __exit__(self, *exception) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()

    def _tell(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # someone killed it: do without
                print(line, file=self._process.stdin, flush=True)

    def watch(self, group: int) -> None:
        self._tell(f"+{group}")

    def forget(self, group: int) -> None:
        self._tell(f"-{group}")


if __name__ == "__main__":
    _go_on_as(_serve())
