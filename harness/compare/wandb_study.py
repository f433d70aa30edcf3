"""A study sent to Weights & Biases: its runs, the report of their comparison, a saved workspace.

    python -m harness.compare FOLDER --wandb [entity/project]

A run is made on the server once, from its own folder or from its line of runs.jsonl, and found
again by its id; what the server has is not sent again. An interrupted run is continued there. The
runs of the comparison have the job type "compare", those of the tuning "tune", and one more,
"comparison", carries the study's figures for the report.

Without a server everything is written to FOLDER/wandb_bundle/STUDY, which the same command sends
from another machine.
"""

import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import tracking
from harness.cli import needs
from harness.compare.findings import Analysis

if TYPE_CHECKING:  # an offline multirun ends without them
    from harness.compare.plots import Picture
    from harness.compare.wandb_runs import SentRun
    from harness.compare.wandb_server import Server

TIMEOUT_S = 30.0  # for each answer, where the runs do not say
AT_ONCE = 8  # runs that are being closed, which is a wait for the server


def tracker_of(analysis: Analysis, target: str = "") -> tracking.WandbTracker:
    """The target: "entity/project", "project", or as the study's runs were tracked. Raises
    ValueError for what W&B does not take."""
    from harness.compare import wandb_report

    settings = wandb_report.tracking_of(analysis)
    entity, slash, project = target.rpartition("/")
    if "/" in entity or (slash and not (entity and project)):
        raise ValueError(f"--wandb is {target}; it must be entity/project, or a project.")
    return tracking.WandbTracker(
        mode="online",
        project=project or settings.get("project") or wandb_report.PROJECT,
        entity=entity or settings.get("entity"),
        timeout_s=settings.get("timeout_s", TIMEOUT_S),
    )


def send(analysis: Analysis, folder: Path, target: str = "", *, draft: bool = False) -> None:
    """Send what the server lacks of a study, save its report and its workspace, and print where
    they are to be seen.

    Args:
        folder: the study's: its runs, an archive or a bundle.
        target: see `tracker_of`.
        draft: keep the report private.

    Raises ValueError if there is no server, after writing the bundle; if it stops answering, saying
    how far it came; or if wandb-workspaces is missing.
    """
    needs("matplotlib")
    from harness.compare import plots, wandb_report
    from harness.compare.wandb_runs import sent_runs, write_bundle
    from harness.compare.wandb_server import NoServer, Server

    if not wandb_report.installed():
        raise ValueError(wandb_report.MISSING)
    tracker = tracker_of(analysis, target)
    runs = sent_runs(analysis.study, folder)
    try:
        server = Server(tracker)
    except NoServer as error:
        place = write_bundle(analysis.study, runs, folder)
        again = command(place, "--wandb", *([target] if target else []))
        raise ValueError(
            f"nothing was sent to W&B ({error}); {error.advice}. From a machine with a network, "
            f"{place} is sent by: {again}"
        ) from None
    pictures = plots.pictures(analysis)
    server.look(analysis.study.name, runs)
    runs = server.placed(runs)
    lacking = [run for run in runs if not server.has(run.run_id, run.sha256)]
    _send_runs(server, lacking, analysis, pictures)
    print(f"W&B: {len(lacking)} runs sent, {len(runs) - len(lacking)} there already")
    ours = {run.run_id for run in runs}
    others = [run_id for run_id in server.of_group if run_id not in ours]
    if others:
        print(
            f"W&B: {len(others)} runs of the group {analysis.study.name} are not of this study any "
            f"more; its panels show them until they are deleted there: {', '.join(others[:6])}"
        )
    try:
        report = server.save_report(analysis, list(pictures), draft=draft)
        workspace = server.save_workspace(analysis)
    except Exception as error:
        raise ValueError(
            f"the runs are at {server.address}, and their report was not saved "
            f"({tracking.reason_of(error)}); the same command tries again."
        ) from None
    print(f"W&B report: {report}\nW&B workspace: {workspace}")


def _send_runs(
    server: "Server",
    runs: "Sequence[SentRun]",
    analysis: Analysis,
    pictures: "Mapping[str, Picture]",
) -> None:
    """Raises ValueError if the server stops answering."""
    from tqdm import tqdm

    done = 0
    try:
        with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(AT_ONCE) as pool:
            waiting: list[tuple[SentRun | None, Future[None]]] = []

            def close(keep: int) -> None:
                nonlocal done
                while len(waiting) > keep:
                    run, closing = waiting.pop(0)
                    closing.result()
                    done += run is not None
                    for path in run.offline if run else ():
                        for file in Path(path).glob("*.wandb"):  # or `wandb sync` sends it again
                            file.with_suffix(".wandb.synced").touch()

            for number, run in enumerate(tqdm(runs, disable=not sys.stderr.isatty(), unit="run")):
                waiting.append((run, server.send(run, Path(place, str(number)), pool)))
                close(AT_ONCE)
            comparison = server.send_comparison(analysis, pictures, Path(place, "comparison"), pool)
            if comparison is not None:
                waiting.append((None, comparison))
            close(0)
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, TimeoutError | ConnectionError):
            raise  # no room for the pictures, say
        raise ValueError(
            f"W&B stopped answering ({tracking.reason_of(error)}) after {done} of {len(runs)} "
            "runs; the same command goes on from there."
        ) from None


def command(folder: Path, *options: str) -> str:
    """The command line that compares a folder, to type in a shell."""
    return shlex.join(["python", "-m", "harness.compare", str(folder), *options])


def at_end(
    folder: Path,
    settings: Mapping[str, Any],
    analyse: Callable[[], Analysis],
    *,
    named: str | None = None,
) -> None:
    """The end of a multirun or a study: send it if its runs are tracked online, name the command if
    offline. A failure is printed as one sentence and stops nothing.

    Args:
        settings: the config's `tracking`.
        analyse: called if something is sent.
        named: the multirun among those of the folder.
    """
    mode = settings.get("mode")
    restrained = os.environ.get("WANDB_MODE", "online")
    if mode is None or restrained == "disabled":
        return
    again = command(folder, *(["--multirun", named] if named else []), "--wandb")
    if mode != "online" or restrained != "online":
        print(f"W&B: {again}")
        return
    try:
        send(analyse(), folder)
    except (ValueError, OSError) as error:
        print(f"Warning: {error} ({again})", file=sys.stderr)
