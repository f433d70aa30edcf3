"""A project on a W&B server: the runs that it has, runs sent to it, and saved views."""

import dataclasses
import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness import tracking
from harness.compare import wandb_report
from harness.compare.findings import Analysis
from harness.compare.plots import Picture
from harness.compare.wandb_runs import SentRun
from harness.disk.digest import digest

FINISHED = ("finished", "failed")  # states of a run that was closed, and not merely lost
OF_STUDIES = ("compare", "tune")  # job types of runs that a study was sent with
DRAFT, SAVED = "runs/draft", "runs"  # W&B's names for kinds of reports
VIEWS = """
    query ProjectViews($project: String!, $entity: String!, $viewType: String!, $cursor: String) {
        project(name: $project, entityName: $entity) {
            allViews(viewType: $viewType, first: 100, after: $cursor) {
                edges { node { id name displayName description } cursor }
                pageInfo { endCursor hasNextPage }
            }
        }
    }
"""


ACCOUNT = (
    "set an account with `wandb login`, or WANDB_BASE_URL and WANDB_API_KEY for a server of your "
    "own"
)


class NoServer(Exception):
    """No account, no server, or none that answers.

    Args:
        advice: the thing to do about it.
    """

    def __init__(self, reason: str, advice: str = ACCOUNT):
        super().__init__(reason)
        self.advice = advice


class Server:
    """A project on a W&B server. Raises NoServer if there is none that answers.

    Args:
        tracker: project, entity and time limit.
    """

    def __init__(self, tracker: tracking.WandbTracker):
        import wandb

        self.tracker, self.known, self.of_group = tracker, dict[str, Any](), list[str]()
        if (mode := os.environ.get("WANDB_MODE", "online")) != "online":
            raise NoServer(f"WANDB_MODE is {mode}", "to send it from here: unset WANDB_MODE")
        try:
            tracking.log_in()
            tracking.end_service_at_exit()
            self.api = wandb.Api(timeout=max(1, round(tracker.timeout_s)))
        except wandb.Error as error:
            reason = tracking.reason_of(error)
            if "did not respond in time" in reason:  # "the service process is busy", it thinks
                address = wandb.setup().settings.base_url
                reason = f"{address} did not answer within {tracker.timeout_s:g} s"
            raise NoServer(reason) from None
        self.entity = tracker.entity
        with suppress(Exception):  # then the first run says whose it is
            self.entity = self.entity or self.api.default_entity

    def look(self, group: str, runs: Sequence[SentRun]) -> None:
        """Note the group's runs that are there, and those of `runs` that were tracked online; a
        server that cannot list them is asked for each when it is sent."""
        tracked = [run.tracked_id for run in runs if run.tracked_id]
        # The client raises many kinds of errors for what a server does not know, as a new project.
        with suppress(Exception):
            path = f"{self.entity}/{self.tracker.project}"
            found = {"$or": [{"group": group}, {"name": {"$in": tracked}}]}
            listed = self.api.runs(path, filters=found, lazy=False, per_page=200)
            for run in listed:
                mine = run.group == group
                if mine or run.job_type not in OF_STUDIES:  # another study's run stays with it
                    self.known[run.id] = run
                if mine and run.job_type in OF_STUDIES:
                    self.of_group.append(run.id)

    def has(self, run_id: str, sha256: str) -> bool:
        """Tell whether the server has all that is sent of a run."""
        if (there := self.known.get(run_id)) is None:
            return False
        sent = there.summary_metrics.get("view_sha256")
        return there.state in FINISHED and sent == sha256

    def placed(self, runs: Sequence[SentRun]) -> list[SentRun]:
        """The runs, with the ids of those that the server has under another id: one that was
        tracked online and is no study's, or one of this study with the same result."""
        free: dict[str, list[str]] = defaultdict(list)
        mine = {run_id for run in runs for run_id in (run.run_id, run.tracked_id)}
        for run_id in self.of_group:
            sha256 = self.known[run_id].summary_metrics.get("result_sha256")
            if run_id not in mine and sha256:
                free[sha256].append(run_id)
        placed = []
        for run in runs:
            others = [run.tracked_id] if run.tracked_id in self.known else free[digest(run.result)]
            if run.run_id not in self.known and others:
                placed.append(dataclasses.replace(run, run_id=others.pop(0)))
            else:
                placed.append(run)
        return placed

    def send(self, run: SentRun, folder: Path, pool: ThreadPoolExecutor) -> "Future[None]":
        """Make or continue a run there; the result waits until the server has all of it."""

        def fill(view: tracking.WandbView) -> None:
            for logged in run.history:
                view.log(logged)
            view.samples(run.samples)
            view.finish(run.result)

        failed = run.result["status"] != "complete"
        return self._send(run.run_id, run.described, run.sha256, fill, folder, pool, failed=failed)

    def send_comparison(
        self,
        analysis: Analysis,
        pictures: Mapping[str, Picture],
        folder: Path,
        pool: ThreadPoolExecutor,
    ) -> "Future[None] | None":
        """The same for the run that carries the figures; None if it is there as it is."""
        import wandb

        study = analysis.study
        run_id = digest([study.name, wandb_report.COMPARISON])[:16]
        about = ("question", "command", "commit", "reference", "metric", "match")
        described = {
            "name": f"{study.name}: {wandb_report.COMPARISON}",
            "group": study.name,
            "job_type": wandb_report.COMPARISON,
            "tags": [wandb_report.COMPARISON],
            "config": {"study": study.name, **{name: getattr(study, name) for name in about}},
        }
        drawn = {
            name: hashlib.sha256(picture.png).hexdigest() for name, picture in pictures.items()
        }
        sha256 = digest([described, drawn])
        if self.has(run_id, sha256):
            return None

        def fill(view: tracking.WandbView) -> None:
            images = {}
            for name, picture in pictures.items():
                (file := folder / f"{name}.png").write_bytes(picture.png)
                images[f"figures/{name}"] = wandb.Image(str(file), caption=picture.caption)
            view.run.log({"step": view.first_step, **images}, step=view.first_step)

        return self._send(run_id, described, sha256, fill, folder, pool)

    def _send(
        self,
        run_id: str,
        described: Mapping[str, Any],
        sha256: str,
        fill: Callable[[tracking.WandbView], None],
        folder: Path,
        pool: ThreadPoolExecutor,
        *,
        failed: bool = False,
    ) -> "Future[None]":
        folder.mkdir()
        run = self.tracker.start(folder, {"id": run_id, **described}, mode="online")
        self.entity = run.entity
        tracking.set_axis(run)
        view = tracking.WandbView(run, harmless=False)
        fill(view)
        run.summary.update({"view_sha256": sha256})  # last: a run that has it is whole
        return pool.submit(run.finish, exit_code=int(failed))

    @property
    def address(self) -> str:
        """The project's, for a browser."""
        return f"{self.api.settings['base_url']}/{self.entity}/{self.tracker.project}"

    # ---- views ----------------------------------------------------------------------------------

    def save_report(self, analysis: Analysis, figures: Collection[str], *, draft: bool) -> str:
        """Save the report, replacing an earlier one of the study's name and question, and return
        its address."""
        entity, project = str(self.entity), self.tracker.project
        report = wandb_report.report(analysis, figures, entity=entity, project=project)
        for kind in (SAVED, DRAFT):
            for view in self._views(kind):
                if (view["displayName"], view["description"]) == (report.title, report.description):
                    report.id = view["id"]
        report.save(draft=draft)
        return report.url

    def save_workspace(self, analysis: Analysis) -> str:
        """Save the workspace, replacing an earlier one of the study, and return its address."""
        name = f"nw-{digest([analysis.study.name])[:11]}-v"
        ids = [view["id"] for view in self._views("project-view") if view["name"] == name]
        view = wandb_report.workspace(
            analysis,
            entity=str(self.entity),
            project=self.tracker.project,
            name=name,
            view_id=ids[0] if ids else "",
        )
        view.save()
        return view.url

    def _views(self, kind: str) -> Iterator[Mapping[str, Any]]:
        from wandb_workspaces._graphql import execute_graphql

        asked = {"project": self.tracker.project, "entity": self.entity, "viewType": kind}
        more: Mapping[str, Any] = {"hasNextPage": True, "endCursor": None}
        while more["hasNextPage"]:
            answer = execute_graphql(self.api, VIEWS, {**asked, "cursor": more["endCursor"]})
            views = (answer["project"] or {}).get("allViews") or {"edges": []}
            yield from (edge["node"] for edge in views["edges"])
            more = views.get("pageInfo") or {"hasNextPage": False}
