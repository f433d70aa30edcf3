"""Hydra's own sweeper, with a record of what it sweeps, and at its end a table and W&B's report.

    python train.py -m rank=1,4,16 seed=0,1,2

It takes the place of hydra/sweeper=basic, whatever the launcher, and sweeps as that one does. See
harness/compare/multirun.py.
"""

import datetime
import os
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.composition import Composition


@dataclass
class MultirunSweeperConf(BasicSweeperConf):
    """The settings of Hydra's own sweeper."""

    _target_: str = "hydra_plugins.multirun_sweeper.MultirunSweeper"


ConfigStore.instance().store(
    group="hydra/sweeper", name="basic", node=MultirunSweeperConf, provider="lora_variants"
)


@dataclass
class _Jobs:
    """The jobs of one folder: the overrides and the config of each."""

    overrides: list[Sequence[str]] = field(default_factory=list)
    configs: list[Mapping[str, Any]] = field(default_factory=list)
    inapplicable: int = 0


class MultirunSweeper(BasicSweeper):
    def sweep(self, arguments: list[str]) -> Any:
        """Run the jobs. Ends the process with one sentence if their record cannot be written.

        Raises what the launcher raises.
        """
        from harness.disk.write import make_folder

        assert self.config is not None and self.hydra_context is not None
        sweep = self.config.hydra.sweep
        self.composition = Composition.of(self.launcher, self.hydra_context, self.config)
        try:  # before Hydra makes it, which would end in a traceback
            sweep.dir = os.path.expanduser(sweep.dir)
            make_folder(Path(sweep.dir), "outputs_dir")
        except OSError as error:
            sys.exit(f"error: {error}")
        self.jobs: dict[Path, _Jobs] = {}
        self.records: dict[Path, str] = {}
        try:
            returns = super().sweep(arguments)
        except SystemExit as end:
            if isinstance(end.code, int) and end.code < 128:  # of a job; else by a signal
                self._conclude()
            raise
        except Exception:  # of a job in this process
            self._conclude()
            raise
        self._conclude()
        return returns

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose each job, as Hydra does here to find mistakes, and record what will be run."""
        from harness.config.identity import ignored_option

        for overrides in batch:
            job = self.composition(overrides)
            try:
                config = job.resolved
                folder, variant = Path(config["outputs_dir"], job.experiment), job.variant
            except OmegaConfBaseException:
                continue  # the job will say what is wrong
            if config["dry_run"] or config["rate_test"]:
                continue
            jobs = self.jobs.setdefault(folder, _Jobs())
            if ignored_option([o.partition("=")[0].lstrip("+") for o in overrides], variant):
                jobs.inapplicable += 1
                continue
            jobs.overrides.append(overrides)
            jobs.configs.append(config)
        for folder, jobs in self.jobs.items():
            self._record(folder, jobs)

    def _record(self, folder: Path, jobs: _Jobs) -> None:
        from harness.compare import multirun
        from harness.config.identity import check_swept

        if not jobs.configs:
            return
        every = [job for batch in self.overrides or () for job in batch]
        questions = sorted({tuple(sorted(filter(_asks, job))) for job in every})
        settings, asked = (list(map(self.composition.values, js)) for js in (jobs.overrides, every))
        keys = _swept(settings)
        shared = Counter(override for overrides in jobs.overrides for override in overrides)
        record = multirun.Multirun(
            name=multirun.record_name(_swept(asked), [str(folder), *questions]),
            started=datetime.datetime.now(datetime.UTC).isoformat(),
            command=shlex.join(["python", "train.py", *sys.argv[1:]]),
            keys=keys,
            overrides=[o for o, number in shared.items() if number == len(jobs.overrides)],
            inapplicable=jobs.inapplicable,
            members=[
                self._member({key: setting[key] for key in keys}, config)
                for setting, config in zip(settings, jobs.configs, strict=True)
            ],
        )
        try:
            check_swept(keys)
            multirun.write(folder, record)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        self.records[folder] = record.name

    def _member(self, values: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
        from harness.compare import multirun

        train = dict(config["train"])
        if train["threads"] is None and (settings := getattr(self.launcher, "settings", None)):
            train["threads"] = settings.threads_each(train["device"])
        return multirun.Member(
            values=values,
            seed=config["seed"],
            asked=multirun.asked(config),
            threads=train["threads"],
            device=train["device"],
            run_dir=config["run_dir"],
        )

    def _conclude(self) -> None:
        """Print the table of the runs and the command for their page, and send them to W&B."""
        for folder, name in self.records.items():
            from harness.compare.brief import conclude

            conclude(folder, name, self.jobs[folder].configs[-1]["tracking"])


def _asks(override: str) -> bool:
    """Tell whether an override is part of the question: another seed answers it once more."""
    from harness.config.identity import is_irrelevant

    key = override.lstrip("+~").partition("=")[0]
    return key != "seed" and not is_irrelevant(key)


def _swept(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that differ between jobs, the variant first. Seeds and experiments make no arms."""
    keys = [
        key
        for key in settings[0]
        if key not in ("seed", "experiment")
        and len({str(setting.get(key)) for setting in settings}) > 1
    ]
    return sorted(keys, key=lambda key: key != "variant")
