"""A run seen in Weights & Biases.

`metrics.jsonl` in the run's folder is the record and W&B a view of it: everything here can be
deleted and rebuilt, and no failure of the server stops a run. Offline by default: the view lies
under `<run_dir>/wandb` and `wandb sync` sends it when the reader wants it sent.

    with tracker.open(run_dir=..., run_id=..., ..., history=rows_so_far) as view:
        view.log({"step": 10, "train/loss_nats": 0.4})
        view.samples([{"text": "a fine film", "predicted": "positive"}])
        view.finish({"test": {"accuracy": 0.81}})

An exception that leaves the block, KeyboardInterrupt and SystemExit included, closes the run as
failed (exit code 1).

What is sent is what is passed to `open` and to the view, in the layout of harness/wandb_run.py.
wandb's own collection is switched off:
console output, code, git state, installed packages, machine and system statistics, crash reports.
"""

import atexit
import functools
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness import wandb_run
from harness.disk.read import check
from harness.words import did_you_mean

if TYPE_CHECKING:
    import wandb

MODES = ("offline", "online")
TAG_LENGTH = 64  # characters; wandb refuses longer ones


# ---- no tracking ---------------------------------------------------------------------------------


class View:
    """The actions of the loop on an open run. This one shows nothing."""

    where: str | None = None  # the address of an online run, the command that sends an offline one

    def log(self, row: Mapping[str, Any]) -> None:
        """Show one row of metrics.jsonl. It has an integer "step", and steps never fall."""

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show sample predictions as one table; a key that a row lacks is an empty cell."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """Set the run's summary from its result, after its rows. The run itself is closed by the
        end of the with-block."""


@dataclass(frozen=True, kw_only=True)
class NoTracker:
    """Shows nothing and writes nothing; wandb is never imported."""

    @contextmanager
    def open(
        self,
        *,
        run_dir: Path,
        run_id: str,
        history: Sequence[Mapping[str, Any]] = (),
        **described: Any,
    ) -> Iterator[View]:
        """Open the view of the run kept in `run_dir`. Nothing is imported or started before.

        Args:
            run_dir: the run's folder; all that is written lies under it.
            run_id: the same for every part of an interrupted run, unique in the project.
            history: the rows already in metrics.jsonl, when an interrupted run continues.
            described: its name, its group (the experiment), its job_type (such as "train"), its
                tags (cut to their last 64 characters, the most wandb takes) and its config, the
                resolved one in plain values.
        """
        yield View()


# ---- Weights & Biases ----------------------------------------------------------------------------


class WandbView(View):
    """The view of one wandb run. What fails in it is said once and stops nothing, or is raised if
    it is not harmless."""

    def __init__(self, run: "wandb.Run", *, harmless: bool = True):
        self.run, self.harmless = run, harmless
        self.again = f"wandb sync {shlex.quote(run.settings.sync_dir)}"
        self.where = self.again if run.offline else str(run.url)
        # 0, or the first step that the server does not have if an online run was resumed.
        self.first_step = run.starting_step
        self.last: Mapping[str, Any] | None = None  # row of metrics.jsonl
        self.warned = False

    def log(self, row: Mapping[str, Any]) -> None:
        self.last, step = row, row["step"]
        if step >= self.first_step:
            with self._harmless():
                self.run.log(wandb_run.row_of(row), step=step)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._table("samples", rows)

    def finish(self, result: Mapping[str, Any]) -> None:
        self._table("layers", wandb_run.layers_of(self.last, result.get("active_rank") or {}))
        with self._harmless():
            self.run.summary.update(wandb_run.summary_of(result))

    def _table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show rows as a table, with the row that was logged last; once, whoever resumes."""
        import wandb

        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[row.get(column) for column in columns] for row in rows]
        # wandb copies a table to where it is uploaded from, by default under the home directory
        # and for ever.
        with self._harmless(), _environment("WANDB_DATA_DIR", self.run.settings.sync_dir):
            if rows and self.run.summary.get(name) is None:
                table = wandb.Table(columns=[*columns], data=cells)
                self.run.log({name: table}, commit=False)

    def close(self, exit_code: int) -> None:
        """Close the run, sending what was not sent; 0 is success. The last call."""
        with self._harmless():
            self.run.finish(exit_code=exit_code)

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self.harmless:
                raise
            if not self.warned:
                _warn(
                    f"W&B misses part of this run ({reason_of(error)}); metrics.jsonl has all "
                    f"of it, and what W&B kept is sent by: {self.again}"
                )
            self.warned = True


@dataclass(frozen=True, kw_only=True)
class WandbTracker(NoTracker):
    """Shows a run in Weights & Biases.

    The environment may restrain this further and never loosen it: WANDB_MODE=offline makes an
    online run offline, WANDB_MODE=disabled shows nothing.

    An offline run that continues is rebuilt from the record, so that `wandb sync` delivers every
    row once. An online one is resumed on the server and only sent the rows it lacks.

    Args:
        mode: "offline" (no network access) or "online". Without an API key, or with a server that
            does not answer, an online run says so once and goes on offline.
        project: the W&B project.
        entity: the W&B user or team; None for the account's default.
        notes: a longer description of the run.
        timeout_s: how long to wait for the server, at the start and again at the end.
    """

    mode: Literal["offline", "online"] = "offline"
    project: str = "lora-variants"
    entity: str | None = None
    notes: str | None = None
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        check(str, self.project, "tracking.project", "text")
        for key in ("entity", "notes"):
            check(str | None, getattr(self, key), f"tracking.{key}", "text or null")
        if self.mode not in MODES:
            raise ValueError(
                f"tracking.mode is {self.mode!r}; it must be offline or online (for none: "
                f"tracking=none).{did_you_mean(self.mode, MODES)}"
            )
        if not 0 < len(self.project) <= 128 or set(self.project) & set("/\\#?%:"):
            raise ValueError(
                f"tracking.project is {self.project!r}; W&B takes 1 to 128 characters, "
                "none of them / \\ # ? % :"
            )
        if type(self.timeout_s) not in (int, float) or not self.timeout_s > 0:
            raise ValueError(f"tracking.timeout_s is {self.timeout_s!r}; it must be positive.")

    @contextmanager
    def open(
        self,
        *,
        run_dir: Path,
        run_id: str,
        history: Sequence[Mapping[str, Any]] = (),
        **described: Any,
    ) -> Iterator[View]:
        environment = os.environ.get("WANDB_MODE", "")
        if environment == "disabled":
            yield View()
            return
        mode = "offline" if environment in ("offline", "dryrun") else self.mode
        described["id"] = run_id
        run = self._start_online(run_dir, described) if mode == "online" else None
        sent_before = any(run_dir.glob("wandb/*run-*/*.syncstate"))
        # Whatever was recorded offline before is part of `history`: kept, it would be sent twice.
        _remove(run_dir.glob("wandb/offline-run-*"), keep=())
        if run is None:
            run = self.start(run_dir, described, mode="offline")
            if sent_before:
                _warn(
                    f"W&B already has rows of this run ({run_id}); delete it there before "
                    "`wandb sync`, which adds all rows to what it finds."
                )
        elif run.starting_step > 0 and not history:
            _warn(
                f"W&B already has rows of this run ({run_id}) and keeps them; it is sent those "
                f"from step {run.starting_step} on. To replace the run, delete it there first."
            )

        view, exit_code = WandbView(run), 1
        try:
            set_axis(run)
            for row in history:
                view.log(row)
            yield view
            exit_code = 0
        finally:
            view.close(exit_code)

    def _start_online(self, run_dir: Path, described: dict[str, Any]) -> "wandb.Run | None":
        """The run on the server, or None and a sentence on stderr."""
        import wandb

        before = set(run_dir.glob("wandb/run-*"))
        try:
            log_in()
            return self.start(run_dir, described, mode="online")
        except wandb.Error as error:
            end_service()  # otherwise it keeps the id as "in use"
            _remove(run_dir.glob("wandb/run-*"), keep=before)
            _warn(
                f"W&B cannot be reached ({reason_of(error)}); the run is recorded offline in "
                f"{run_dir}."
            )
            return None

    def start(
        self, run_dir: Path, described: dict[str, Any], *, mode: Literal["offline", "online"]
    ) -> "wandb.Run":
        """A run of the client, new or resumed. Raises wandb.Error if the server does not answer."""
        import wandb

        settings = wandb.Settings(
            silent=True,
            host="",
            program="train.py",  # and not where it lies
            console="off",  # stdout and stderr stay as they are
            init_timeout=self.timeout_s,
            finish_timeout=self.timeout_s,
            finish_timeout_raises=True,
            use_dot_wandb=False,
            # A table is found by its path in the run's folder, which may be moved before it is
            # synced; the default refers to a file by its absolute path.
            allow_offline_artifacts=False,
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            label_disable=True,
            x_save_requirements=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
        )
        # Crash reports to W&B's developers are off unless asked for; only the environment can say.
        reporting = os.environ.get("WANDB_ERROR_REPORTING", "false")
        with _environment("WANDB_ERROR_REPORTING", reporting):
            run = wandb.init(
                **{**described, "tags": [tag[-TAG_LENGTH:] for tag in described["tags"] if tag]},
                mode=mode,
                resume="allow" if mode == "online" else None,
                project=self.project,
                entity=self.entity,
                notes=self.notes,
                dir=str(run_dir),
                reinit="create_new",  # leaves a run of the caller's own alone
                settings=settings,
            )
        end_service_at_exit()
        return run


def set_axis(run: "wandb.Run") -> None:
    """Make "step" the axis of every chart, and no chart itself."""
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")


def log_in() -> None:
    """Take the account that this machine knows. Raises wandb.Error if it knows none."""
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))  # or login() prints
    if not wandb.login(prompt=False, verify=False):
        raise wandb.Error("no API key: run `wandb login` or set WANDB_API_KEY")


# ---- wandb's own process -------------------------------------------------------------------------


def end_service(timeout_s: float = 10.0) -> None:
    """End the process that wandb starts next to this one, by force if it has not ended by then.

    `wandb.teardown` waits for it without a limit, and when its server was not there it sometimes
    never ends (wandb 0.31: in one of 20 trials).
    """
    import wandb
    from wandb.sdk import wandb_setup

    connection = wandb_setup.singleton()._connection
    owned = connection._proc if connection is not None else None
    timer = threading.Timer(timeout_s, owned._process.kill if owned is not None else lambda: None)
    timer.start()
    try:
        wandb.teardown()
    except SystemExit:  # how it says that its process did not end well
        _warn("W&B's own process did not end and was killed.")
    finally:
        timer.cancel()


@functools.cache
def end_service_at_exit() -> None:
    """End it so when this process ends, instead of as wandb would. Call after wandb has started."""
    atexit.register(end_service)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """os.environ[name] is `value` inside the block; some settings wandb reads there alone."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def reason_of(error: Exception) -> str:
    """The message on one line, without the advice that wandb adds on settings of its own."""
    message = str(error).partition("\nConsider")[0] or type(error).__name__
    return " ".join(message.split()).rstrip(".")


def _remove(folders: Iterator[Path], *, keep: Collection[Path]) -> None:
    for folder in folders:
        if folder not in keep:
            shutil.rmtree(folder)


def _warn(sentence: str) -> None:
    print(f"Warning: {sentence}", file=sys.stderr)
