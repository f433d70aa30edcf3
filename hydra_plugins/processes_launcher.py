"""hydra/launcher=processes: each job of a multirun in its own process. See harness/study/pool.py.

A job's command line makes it compose the same config that the launcher composed for it. It has
hydra.mode=RUN, which an experiment that asks for a multirun cannot change.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.composition import Composition

# Modules that take long to import.
PRELOAD = (
    "hydra.core.override_parser.overrides_parser",
    "harness.models.hf",
    "transformers",
    "wandb.apis.public",
)


@dataclass
class ProcessesLauncherConf:
    """The settings of the launcher. harness.study.pool.LaunchSettings checks their values and their
    kinds, which are Any here, since Hydra would refuse a wrong one in five lines."""

    _target_: str = "hydra_plugins.processes_launcher.ProcessesLauncher"
    n_jobs: Any = None  # processes at a time; null: a core each (or one for each of `gpus`)
    threads: Any = None  # CPU threads of each; null: cores // n_jobs; 0: the job's own choice
    gpus: Any = None  # CUDA device ids to deal out: [0,1]
    on_error: Any = "continue"  # or stop
    preload: Any = field(default_factory=lambda: [*PRELOAD])  # imported once for all jobs; or []


ConfigStore.instance().store(
    group="hydra/launcher", name="processes", node=ProcessesLauncherConf, provider="lora_variants"
)


class FailedJob(JobReturn):
    """A job that failed. The launcher has reported it, so Hydra does not."""

    @property
    def return_value(self) -> Any:
        raise self._return_value


class ProcessesLauncher(Launcher):
    """Starts each job in a process. `setup` reads the settings and refuses a wrong one in a
    sentence."""

    def __init__(self, **settings: Any):
        pass

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from harness.study.pool import LaunchSettings

        settings = OmegaConf.to_container(config.hydra.launcher, resolve=True)
        del settings["_target_"]
        try:
            self.settings = LaunchSettings(**settings)
        except ValueError as error:
            sys.exit(f"error: {error}")
        self.config = config
        self.composition = Composition(hydra_context.config_loader, config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run all jobs and wait. Ends the process with 128 + n after signal n."""
        from hydra.errors import HydraException

        from harness.config.identity import ignored_option
        from harness.machine.processes import program
        from harness.study.index import RunIndex
        from harness.study.pool import Job, Pool, differing, log_name

        labels = differing(job_overrides)
        device = self.config.train.device
        threads = self.settings.threads_each(device)
        plain = self.config.hydra.runtime.choices["hydra/sweeper"] == "basic"
        start, hydra_overrides = [*program(), *_flags()], self._hydra_overrides()
        indexes: dict[Path, RunIndex] = {}

        def prepare(index: int) -> Job:
            overrides, config, kept, ignored = [*job_overrides[index]], None, None, None
            given = [override.lstrip("+").partition("=")[0] for override in overrides]
            experiment = "default"
            try:
                job = self.composition(overrides)
                experiment, config = job.experiment, job.resolved
                ignored = ignored_option(given, job.variant)
            except (HydraException, OmegaConfBaseException):
                config = None  # the job will say what is wrong
            used = config and config["train"]["threads"]
            if config and threads and used is None and "train.threads" not in given:
                overrides.append(f"train.threads={threads}")
                used = config["train"]["threads"] = threads
            limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if used else ()
            outputs = Path((config or self.config)["outputs_dir"], experiment)
            if config and not (config["dry_run"] or config["rate_test"]):
                kept = Path(config["run_dir"] or outputs)
            return Job(
                command=[*start, *overrides, *hydra_overrides],
                environment={name: str(used) for name in limits},
                log=outputs / "logs" / log_name(initial_job_idx + index, labels[index]),
                config=config,
                runs=indexes.setdefault(kept, RunIndex(kept)) if kept else None,
                force=bool(config and config["force"]),
                inapplicable=f"the variant ignores {ignored}" if ignored else "",
            )

        pool = Pool(
            labels,
            prepare,
            at_once=self.settings.at_once(device),
            gpus=self.settings.gpus,
            stop_on_error=self.settings.on_error == "stop",
            divergence_fails=plain,
            preload=self.settings.preload,
            first=initial_job_idx,
        )
        each = f", {threads} thread{'s' * (threads > 1)} each" if threads else ""
        print(f"{len(labels)} jobs, {self.settings.at_once(device)} at a time{each}")
        outcomes = pool.run()
        if pool.signal:
            sys.exit(128 + pool.signal)
        # Hydra's own sweeper stops at the first failure that it asks for: with an exit code, since
        # all is said. Others take an exception as a trial that failed, and go on.
        failure = SystemExit(1) if plain else RuntimeError("this job failed")

        def returned(overrides: Sequence[str], outcome: Any) -> JobReturn:
            ok = outcome.state not in ("failed", "stopped")
            return (JobReturn if ok else FailedJob)(
                overrides=[*overrides],
                task_name=self.config.hydra.job.name,
                working_dir=os.getcwd(),
                status=JobStatus.COMPLETED if ok else JobStatus.FAILED,
                _return_value=_score(outcome.result) if ok else failure,
            )

        return list(map(returned, job_overrides, outcomes))

    def _hydra_overrides(self) -> list[str]:
        """The overrides of hydra.* that concern a job. The choices of a launcher and a sweeper
        stay, since an experiment may set their keys; with hydra.mode=RUN they are never used."""
        dropped = ("hydra.mode.", "hydra.launcher.", "hydra.sweeper.", "hydra.sweep.")
        return [
            override
            for override in self.config.hydra.overrides.hydra
            if not f"{override.lstrip('+~').partition('=')[0]}.".startswith(dropped)
        ] + ["hydra.mode=RUN"]


def _flags() -> list[str]:
    """The flags of the command line that say where configs are."""
    from hydra._internal.utils import get_args_parser

    given, _ = get_args_parser().parse_known_args(sys.argv[1:])
    flags = []
    for name in ("config_path", "config_name", "config_dir"):
        if (value := getattr(given, name)) is not None:
            flags += [f"--{name.replace('_', '-')}", value]
    return flags


def _score(result: Any) -> float | None:
    """The value that a sweeper optimises: the validation score; chance if the run diverged."""
    if result is None:
        return None
    if result["status"] != "complete":
        from harness.tasks.metrics import metrics_of

        metric = metrics_of(result).get(result.get("primary_metric", "accuracy"))
        return metric.chance if metric and math.isfinite(metric.chance) else None
    return (result.get("validation") or {}).get(result.get("primary_metric", "accuracy"))
