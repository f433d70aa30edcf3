"""Runs the jobs of a multirun in processes, several at a time, and shows their progress.

No torch and no Hydra: hydra_plugins/processes_launcher.py says what the jobs are.
"""

import hashlib
import itertools
import os
import re
import shlex
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, TextIO

from pydantic import Field

from harness.config.identity import run_key
from harness.config.overrides import text_override
from harness.disk import inputs, locks
from harness.disk.kinds import Count, Positive
from harness.disk.read import check
from harness.loop.result import read_row
from harness.machine import processes, signals
from harness.study.index import Found, RunIndex
from harness.study.screen import Screen, clock, cut, printable, tail
from harness.tasks.metrics import title

POLL_S = 0.1  # between looks at the processes
PROGRESS_S = 2.0  # between looks at the run folders
GRACE_S = 10.0  # from SIGTERM to SIGKILL

State = Literal["done", "skipped", "n/a", "failed", "diverged", "stopped"]


# ---- settings ------------------------------------------------------------------------------------


_Gpu = Count | Annotated[str, Field(pattern=r"^[A-Za-z0-9_./:-]+$")]
_KINDS: Mapping[str, tuple[Any, str]] = {  # setting -> its schema, in words
    "n_jobs": (Positive | None, "an integer from 1 up, or null"),
    "threads": (Count | None, "an integer from 0 up, or null"),
    "gpus": (
        Annotated[list[_Gpu], Field(min_length=1)] | None,
        "a list of CUDA device ids such as [0,1], or null",
    ),
    "preload": (
        list[str] | tuple[str, ...],
        "a list of modules such as [torch,transformers], or []",
    ),
    "on_error": (Literal["continue", "stop"], "continue or stop"),
}


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """The keys of hydra.launcher. Raises ValueError on a wrong value.

    Args:
        n_jobs: at most so many processes at a time; None: one per GPU given, one if the jobs would
            otherwise share a GPU unasked, else one per CPU core.
        threads: CPU threads of each; None: cores // n_jobs, at least 1; 0: the jobs' own choice.
        gpus: ids for CUDA_VISIBLE_DEVICES, one to a process in turn; None: all are left visible.
        on_error: continue with the other jobs when one fails, or stop them.
        preload: modules that are imported once for all jobs; see `processes.Template`.
    """

    n_jobs: int | None = None
    threads: int | None = None
    gpus: Sequence[int | str] | None = None
    on_error: str = "continue"
    preload: Sequence[str] = ()

    def __post_init__(self):
        for key, (kind, words) in _KINDS.items():
            check(kind, getattr(self, key), f"hydra.launcher.{key}", words)

    def at_once(self, device: str) -> int:
        """The number of processes at a time, for jobs with this train.device."""
        if self.n_jobs is not None:
            return self.n_jobs
        if self.gpus is not None:
            return len(self.gpus)
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        gpu_here = any(Path("/dev").glob("nvidia[0-9]*")) and not hidden
        return 1 if device != "cpu" and gpu_here else cores()

    def threads_each(self, device: str) -> int | None:
        """CPU threads of each process; None: its own choice."""
        if self.threads is not None:
            return self.threads or None
        return max(1, cores() // self.at_once(device))


def cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- jobs ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Job:
    """A process to start, and the places that show its progress.

    Args:
        command: the program and its arguments.
        environment: variables in addition to this process's own.
        log: file for all that the job prints.
        config: its resolved config, None if that is not known.
        runs: where its run is kept; None if it keeps none, or the config is not known.
        force: start it even if its run is finished.
        inapplicable: the reason not to start it; its variant lacks an option that was set.
    """

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    runs: RunIndex | None = None
    force: bool = False
    inapplicable: str = ""

    def find(self, *, rescan: bool = True) -> Found | None:
        """Finds its run's folder, if there is one."""
        if self.runs is None or self.config is None:
            return None
        return self.runs.find(self.config, rescan=rescan)

    @property
    def key(self) -> str | None:
        """Equal for two jobs that would write one folder."""
        if self.runs is None or self.config is None:
            return None
        return f"{self.runs.folder} {run_key(self.config)}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a job; `result` is its result.json, `rerun` the shell command that repeats it."""

    state: State
    result: Mapping[str, Any] | None = None
    reason: str = ""
    rerun: str = ""


def differing(jobs: Sequence[Sequence[str]]) -> list[str]:
    """A label for each job: the overrides that not all jobs share, or all if none differs."""
    shared = set(jobs[0]).intersection(*jobs[1:]) if len(jobs) > 1 else set()
    labels = [[o for o in overrides if o not in shared] or overrides for overrides in jobs]
    return [printable(" ".join(label)) or "no overrides" for label in labels]


def log_name(index: int, label: str) -> str:
    """A short file name, valid on every system, for a job's label."""
    name = re.sub(r"[^\w.=+-]+", "_", label, flags=re.ASCII).strip("_.")
    if len(name) > 80:
        name = f"{name[:71]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    return f"{index:03d}_{name}.log"


def progress(metrics: Path) -> tuple[int, float | None] | None:
    """The last step in metrics.jsonl and the last training loss in nats; None before any."""
    try:
        with open(metrics, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**18))
            lines = file.read().splitlines()
    except OSError:
        return None
    step = None
    for line in reversed(lines):
        if (row := read_row(line)) is None:  # cut off at either end
            continue
        step = step or row["step"]
        if isinstance(loss := row.get("train/loss_nats"), float):
            return step, loss
    return step and (step, None)


# ---- the pool ------------------------------------------------------------------------------------


@dataclass
class _Running:
    index: int
    job: Job
    process: processes.Process
    slot: int
    rerun: str
    log: Path
    header: int  # bytes of the log's first line
    held: int  # descriptor of the log, whose lock keeps other launchers from writing there
    earlier: tuple[int, ...]  # which result there was before
    started: float = field(default_factory=time.monotonic)
    folder: Path | None = None
    first: tuple[float, int] | None = None  # when the first step was seen, and which
    now: tuple[int, float | None] | None = None

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def see_progress(self, *, rescan: bool) -> None:
        if self.folder is None and (found := self.job.find(rescan=rescan)) is not None:
            self.folder = found.path
        if self.folder is not None:
            self.now = progress(self.folder / "metrics.jsonl")
            if self.now and self.first is None:
                self.first = (time.monotonic(), self.now[0])

    def describe(self) -> str:
        """The step, the loss, the time spent and the time left, as far as they are known."""
        parts = []
        if self.now and self.job.config:
            (step, loss), steps = self.now, self.job.config["train"]["steps"]
            parts.append(f"step {step}/{steps}")
            if loss is not None:
                parts.append(f"loss {loss:.3f}")
        parts.append(clock(self.elapsed_s))
        if self.now and self.job.config and self.first and step > self.first[1]:
            step_s = (time.monotonic() - self.first[0]) / (step - self.first[1])
            parts.append(f"{clock(step_s * (steps - step))} left")
        return "  ".join(parts)


class Pool:
    """Runs jobs, `at_once` at a time, and shows their progress.

    Args:
        labels: a line for each job.
        prepare: job index -> Job; called when its turn comes.
        at_once: processes at a time.
        gpus: see LaunchSettings.
        stop_on_error: end the others when a job fails.
        divergence_fails: count a run whose loss became infinite or NaN as failed; else it is an
            outcome like another.
        preload: modules that all jobs will import; see `processes.Template`.
        first: number of the first job, when a sweep comes in batches.
        stream: where to show it; None: standard output.
    """

    def __init__(
        self,
        labels: Sequence[str],
        prepare: Callable[[int], Job],
        *,
        at_once: int,
        gpus: Sequence[int | str] | None = None,
        stop_on_error: bool = False,
        divergence_fails: bool = True,
        preload: Sequence[str] = (),
        first: int = 0,
        stream: TextIO | None = None,
    ):
        self.labels, self.prepare, self.gpus, self.first = labels, prepare, gpus, first
        self.preload = preload
        self.stop_on_error, self.divergence_fails = stop_on_error, divergence_fails
        self.screen = Screen(stream or sys.stdout)
        self.signal: int | None = None  # that asked this process to end
        self._signals = 0
        self._queue = deque(range(len(labels)))
        self._slots = deque(range(at_once))
        self._running: dict[int, _Running] = {}
        self._same: dict[str, list[int]] = {}  # jobs that wait for one that writes their folder
        self._elsewhere: list[int] = []  # jobs whose run another launcher, or a user, has underway
        self._told: set[int] = set()  # of the jobs elsewhere, those that were announced
        self._outcomes: dict[int, Outcome] = {}
        self._stopping = False

    def run(self) -> list[Outcome]:
        """Run all jobs; one outcome for each. `signal` is set if a signal ended the pool early."""
        began, looked = time.monotonic(), time.monotonic()
        with (
            signals.noted_by(self._note),
            processes.Watcher() as self._watcher,
            processes.Template(self.preload) as self._template,
        ):
            try:
                while (self._queue or self._running or self._elsewhere) and not (
                    self.signal or self._stopping
                ):
                    busy = self._reap()
                    if self._queue and self._slots and not self._stopping:
                        self._start(self._queue.popleft())
                        busy = True
                    if time.monotonic() - looked > PROGRESS_S:
                        self._look()
                        self._queue.extend(self._elsewhere)
                        self._elsewhere.clear()
                        looked = time.monotonic()
                    self.screen.draw(self._table)
                    if not busy:
                        time.sleep(POLL_S)
            finally:
                self._end_all()
        self._summarise(time.monotonic() - began)
        return [self._outcomes[index] for index in range(len(self.labels))]

    # -- one job --

    def _start(self, index: int) -> None:
        job = self.prepare(index)
        if job.inapplicable:
            self._finish(index, Outcome(state="n/a", reason=job.inapplicable), job=job)
            return
        found = job.find()
        finished = found if found and found.result is not None and not job.force else None
        if finished and not inputs.changed(finished.inputs):
            self._finish(index, self._judge(finished.result, earlier=True), job=job)
            return
        if (key := job.key) is not None and key in self._same:
            self._same[key].append(index)
            return
        if found is not None and (busy := locks.taken_by(found.path)):
            self._wait_for(index, busy)
            return
        if finished:  # maybe on other files: the run says if its result stands, where that is kept
            here = text_override("run_dir", str(finished.path))
            job = replace(job, command=[*job.command, here])
        if key is not None:
            self._same[key] = []
        slot, environment = self._slots.popleft(), dict(job.environment)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(self.gpus[slot % len(self.gpus)])
        gpu = f"CUDA_VISIBLE_DEVICES={environment['CUDA_VISIBLE_DEVICES']} " if self.gpus else ""
        rerun = gpu + shlex.join(job.command)
        try:
            log, held = own_log(job.log)
            header = os.write(held, f"$ {rerun}\n".encode(errors="surrogateescape"))
        except OSError as error:  # its own failure, and not that of the others
            self._slots.appendleft(slot)
            if key is not None:
                self._queue.extendleft(reversed(self._same.pop(key)))
            self._finish(index, Outcome(state="failed", reason=str(error)), job=job)
            return
        process = self._template.start(job.command, environment, log)
        self._watcher.watch(process.pid)
        earlier = found.written if found else ()
        run = _Running(index, job, process, slot, rerun, log, header, held, earlier)
        self._running[index] = run
        self._say(index, "running")

    def _wait_for(self, index: int, busy: str) -> None:
        """Try a job again later: another process has its run."""
        self._elsewhere.append(index)
        if index not in self._told:
            self._told.add(index)
            self._say(index, "waiting", printable(busy))

    def _reap(self) -> bool:
        """Take in the jobs that have ended; True if there was one."""
        ended = [run for run in self._running.values() if run.process.poll() is not None]
        for run in ended:
            self._take_in(run)
        return bool(ended)

    def _take_in(self, run: _Running, *, stopped: bool = False) -> None:
        processes.signal_group(run.process, "SIGKILL")  # children that it left
        self._watcher.forget(run.process.pid)
        del self._running[run.index]
        self._slots.append(run.slot)
        if run.job.key is not None:
            self._queue.extendleft(reversed(self._same.pop(run.job.key)))
        code = run.process.wait()
        os.close(run.held)
        found = run.job.find()
        if code == locks.EXIT_CODE and not stopped:
            busy = locks.taken_by(found.path) if found else ""
            self._wait_for(run.index, busy or "another process had its folder")
            return
        earlier = found is not None and found.written == run.earlier != ()
        if earlier and run.job.force:
            found, earlier = None, False  # the result that it was to replace
        result = found.result if found else None
        if stopped and code != 0:
            outcome = Outcome(state="stopped")
        elif code != 0 and (result is None or result["status"] == "complete"):
            outcome = Outcome(state="failed", reason=processes.exit_reason(code))
        else:
            outcome = self._judge(result, earlier=earlier)
        self._finish(run.index, outcome, job=run.job, run=run)

    def _judge(self, result: Mapping[str, Any] | None, *, earlier: bool = False) -> Outcome:
        """The outcome of a job by its result; None if the job keeps no run."""
        if result is None or result["status"] == "complete":
            return Outcome(state="skipped" if earlier else "done", result=result)
        diverged = result.get("failure") == "NonFiniteLoss"
        word = ("diverged" if diverged else "failed") + (" earlier" if earlier else "")
        state: State = "diverged" if diverged and not self.divergence_fails else "failed"
        return Outcome(state=state, result=result, reason=f"{word}: {result.get('reason')}")

    def _finish(
        self, index: int, outcome: Outcome, *, job: Job, run: _Running | None = None
    ) -> None:
        parts = [clock(run.elapsed_s)] if run else []
        for split in ("test", "validation"):
            metric = (outcome.result or {}).get("primary_metric", "accuracy")
            score = ((outcome.result or {}).get(split) or {}).get(metric)
            if score is not None:
                parts.append(f"{split} {title(metric)} {score:.4f}")
                break
        if outcome.reason:
            parts.append(printable(outcome.reason))
        more = []
        if outcome.state == "failed":
            self._stopping |= self.stop_on_error
            rerun = run.rerun if run else shlex.join(job.command)
            if outcome.result is not None and not job.force:
                rerun += " force=true"  # or it would only repeat what is known
            outcome = replace(outcome, rerun=rerun)
            if run:
                more = [f"    | {line}" for line in tail(run.log, run.header)]
                more.append(f"    log: {run.log}")
            more.append(f"    again: {rerun}")
        self._outcomes[index] = outcome
        self._say(index, outcome.state, "  ".join(parts), *more)

    # -- all of them --

    def _end_all(self) -> None:
        """End all jobs: SIGTERM, and SIGKILL after GRACE_S or at a second signal."""
        for run in self._running.values():
            processes.signal_group(run.process, "SIGTERM")
        asked, deadline = self._signals, time.monotonic() + GRACE_S
        while any(run.process.poll() is None for run in self._running.values()):
            if time.monotonic() > deadline or self._signals > asked:
                for run in self._running.values():
                    processes.signal_group(run.process, "SIGKILL")
                for run in self._running.values():
                    run.process.wait()
            time.sleep(POLL_S)
        for run in list(self._running.values()):
            self._take_in(run, stopped=True)
        for index in range(len(self.labels)):
            self._outcomes.setdefault(index, Outcome(state="stopped"))

    def _look(self) -> None:
        """Read the progress of the running jobs, with one scan of the disk for all of them."""
        for number, run in enumerate(sorted(self._running.values(), key=lambda r: bool(r.folder))):
            run.see_progress(rescan=number == 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note Ctrl-C and similar signals, so that they never interrupt the pool's own code."""
        self.signal = self.signal or number
        self._signals += 1

    # -- what is shown --

    def _say(self, index: int, state: str, text: str = "", *more: str) -> None:
        line = f"{self._number(index)} {state:<8} {self.labels[index]}  {text}".rstrip()
        self.screen.say(line, *more)

    def _number(self, index: int) -> str:
        last = str(self.first + len(self.labels))
        return f"[{self.first + index + 1:>{len(last)}}/{last}]"

    def _table(self, height: int) -> list[str]:
        """The running jobs, the next ones and the counts, in at most `height` lines."""
        rows = [
            (self._number(i), "running", self.labels[i], run.describe())
            for i, run in sorted(self._running.items())
        ]
        rows += [(self._number(i), "queued", self.labels[i], "") for i in list(self._queue)[:3]]
        width = min(60, max((len(label) for *_, label, _ in rows), default=0))
        lines = [
            f"{number} {state:<8} {cut(label, width):<{width}}  {more}".rstrip()
            for number, state, label, more in rows
        ]
        counts = Counter[str](outcome.state for outcome in self._outcomes.values())
        waiting = len(self.labels) - len(self._outcomes) - len(self._running)
        counts.update(running=len(self._running), queued=waiting)
        return [*lines[: max(0, height - 1)], _counted(counts)]

    def _summarise(self, elapsed_s: float) -> None:
        """Print the number of jobs by outcome, and the commands that repeat the failed ones."""
        self.screen.draw(None)
        counts = Counter[str](outcome.state for outcome in self._outcomes.values())
        self.screen.say(f"{_counted(counts)} in {clock(elapsed_s)}")
        for index, outcome in sorted(self._outcomes.items()):
            if outcome.state == "failed":
                again = f"    {outcome.rerun}"
                self._say(index, outcome.state, printable(outcome.reason), again)


def own_log(path: Path) -> tuple[Path, int]:
    """Open an empty log for one job; its path and descriptor. If another launcher writes `path`,
    the name gets the first free number. OSError if none can be opened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = path
    for number in itertools.count(2):
        held = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if locks.lock(held) is not False:
                os.ftruncate(held, 0)
                return path, held
        except OSError:  # a device, or a pipe
            os.close(held)
            raise
        os.close(held)
        path = first.with_name(f"{first.stem}-{number}{first.suffix}")
    raise AssertionError


def _counted(counts: Mapping[str, int]) -> str:
    order = ("done", "skipped", "n/a", "diverged", "failed", "stopped", "running", "queued")
    return ", ".join(f"{counts[state]} {state}" for state in order if counts.get(state)) or "0 jobs"
