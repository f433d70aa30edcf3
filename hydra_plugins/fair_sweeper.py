"""hydra/sweeper=fair: a study of several arms with equal tuning and paired seeds.

    python train.py -m experiment=variants_movie                        arms named by an experiment
    python train.py -m hydra/sweeper=fair variant=lora,dora seed=0,1,2  arms swept by hand
    ... dry_run=true                                                    print the plan and stop

The same command continues a study that was interrupted and regenerates the report of a finished
one. harness/study/ holds the decisions; this file composes configs and launches jobs.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.composition import Composition


@dataclass
class FairSweeperConf:
    """The settings of a study, hydra.sweeper.*. Their kinds are Any, since Hydra would refuse a
    wrong value in five lines; harness.study.design.read_design refuses it in one sentence."""

    _target_: str = "hydra_plugins.fair_sweeper.FairSweeper"
    question: Any = ""  # what the study asks, one sentence for its page
    # name -> [overrides], or {overrides: [...], seed_offset: n} to shift all seeds of the arm;
    # null: the choices swept on the command line
    arms: Any = None
    reference: Any = None  # the arm that the others are compared with; null: the first
    primary: Any = None  # the arms of the Holm family; null: all but the reference
    metric: Any = None  # of the task's; null: its primary one, accuracy for a classifier
    match: Any = None  # rank, parameters or none; null: rank, unless it or the layers are swept
    # key -> {multipliers: [...]} of the arm's own value, or {values: [...]}; {}: no tuning;
    # null: variant.lr over 7 half decades
    tune: Any = None
    max_growth: Any = 2  # points that may be added where the best is at an edge of the multipliers
    tuning_seeds: Any = field(default_factory=lambda: [100, 101])
    seeds: Any = field(default_factory=lambda: list(range(8)))
    archive: Any = None  # a runs.jsonl, or a folder with one, whose runs count as finished


ConfigStore.instance().store(
    group="hydra/sweeper", name="fair", node=FairSweeperConf, provider="lora_variants"
)


class FairSweeper(Sweeper):
    """Runs a study. It reads its settings from the config and not from its arguments, since the
    jobs resolve the interpolations in the overrides of arms."""

    def __init__(self, **settings: Any):
        pass

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from hydra.core.plugins import Plugins

        self.config = config
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self.composition = Composition.of(self.launcher, hydra_context, config)

    def sweep(self, arguments: list[str]) -> None:
        """Run the study. Ends the process with one sentence and exit code 1 if it cannot."""
        from harness.compare.wandb_study import at_end

        try:
            phases = self._prepare(arguments)
            if not self.config.dry_run:
                analysis = phases.run()
                settings = OmegaConf.to_container(self.config.tracking, resolve=True)
                at_end(self.folder, settings, lambda: analysis)
        except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            cause = error.__cause__ if isinstance(error, HydraException) else None
            print(f"error: {cause or error}", file=sys.stderr)
            sys.exit(1)

    def _prepare(self, arguments: list[str]) -> Any:
        """Read and check everything that can be checked, and print the plan; the study, ready to be
        run, as harness.study.phases.Phases."""
        from harness.cli import needs
        from harness.compare.study import Study
        from harness.config.identity import check_swept
        from harness.machine.hardware import git
        from harness.study import match
        from harness.study.design import grid, key_of, plan, read_design, with_metric
        from harness.study.phases import Phases, read_task

        for package in ("matplotlib", "scipy"):  # of the report at the end
            needs(package)
        if self.config.rate_test:
            raise ValueError("rate_test plots one run's loss; leave it out of a study.")
        if not self.config.train.evaluate_test:
            raise ValueError("a study reports on test; leave train.evaluate_test=false out.")
        common, swept, seeds = self._command_line(arguments)
        check_swept(key for key, values in swept.items() if len(values) > 1)
        typed = {o.lstrip("+").partition("=")[0] for o in self.config.hydra.overrides.hydra}
        if seeds is not None and "hydra.sweeper.seeds" in typed:
            raise ValueError("seeds are given twice, by seed and by hydra.sweeper.seeds.")
        settings = OmegaConf.to_container(self.config.hydra.sweeper, resolve=False)
        self.design = design = read_design(settings, swept=swept, seeds=seeds, common=common)
        name = self.config.hydra.runtime.choices.get("experiment") or "default"
        self.folder = Path(self.config.outputs_dir, name).expanduser()
        common = [*common, *self._pinned()]
        self.arms, inapplicable = {}, []
        for arm, own in design.arms.items():
            checked = self._checked(common, own)
            unread = self._unread(checked)
            inapplicable += [(o, arm) for o in common if key_of(o) in unread]
            applicable = [o for o in checked[: len(common)] if key_of(o) not in unread]
            self.arms[arm] = [*applicable, *checked[len(common) :]]
        configs = {arm: self._resolved(overrides) for arm, overrides in self.arms.items()}
        self._check_settings(configs)
        data: dict[str, str] = {}
        if not self.config.dry_run:  # a plan needs no data
            task = read_task(configs[design.reference], data)
            self.design = design = with_metric(design, task.metrics, task.primary_metric)
        tuned = list(design.tune)
        own = {
            arm: {key: _value(config, key, arm) for key in tuned or ["variant.lr"]}
            for arm, config in configs.items()
        }
        cells = {arm: grid(design.tune, values) for arm, values in own.items()}
        print(plan(design, name, own))
        for override, arm in inapplicable:
            print(f"n/a: {override} for {arm}, whose variant has no such option")
        matched: dict[str, dict[str, Any]] = {}
        if design.match == "rank":
            match.check_rank(configs, design.reference)
        elif design.match == "parameters":
            matched = self._match_parameters(configs)
        ranks = {arm: [f"rank={found['rank']}"] for arm, found in matched.items()}
        free = list(configs[design.reference]["free"])
        varied = [key_of(o) for overrides in design.arms.values() for o in overrides]
        for key in [*varied, *(["rank"] if matched else []), *tuned]:
            if key not in (*free, "variant", "run_dir") and not key.startswith("variant."):
                free.append(key)
        declared = [] if free == configs[design.reference]["free"] else [f"free=[{','.join(free)}]"]
        self.arms = {
            arm: [*overrides, *ranks.get(arm, []), *declared]
            for arm, overrides in self.arms.items()
        }
        for arm in self.arms:  # a mistake in a tuned value should not wait for its turn
            self._job(arm, "tune", design.seeds[0], cells[arm][-1])
        named = OmegaConf.select(self.config, "hydra.sweeper.arms")
        varied = {arm: self.composition.values(o) for arm, o in design.arms.items() if not named}
        asked = ("question", "reference", "primary", "match", "tune", "tuning_seeds", "seeds")
        study = Study(
            name=name,
            command=shlex.join(["python", "train.py", *sys.argv[1:]]),
            commit=git("rev-parse", "HEAD"),
            arms={arm: [*o, *ranks.get(arm, [])] for arm, o in design.arms.items()},
            metric=design.metric or "",  # of a plan, which nobody keeps
            matched=matched,
            free=free,
            varied=varied,
            **{setting: getattr(design, setting) for setting in asked},
        )
        return Phases(
            design,
            study,
            self.folder,
            cells,
            data=data,
            job=self._job,
            launch=self.launcher.launch,
            force=self.config.force,
        )

    def _command_line(
        self, arguments: list[str]
    ) -> tuple[list[str], dict[str, list[str]], list[int] | None]:
        """The overrides for every run, the swept choices, and the seeds if given."""
        common: list[str] = []
        swept: dict[str, list[str]] = {}
        for override in map(self.composition.parse, arguments):
            key = override.get_key_element()
            if override.is_discrete_sweep():
                swept[key] = list(override.sweep_string_iterator())
            elif override.is_sweep_override():
                raise ValueError(f"{override.input_line} is no list of values; give them: a,b,c.")
            elif key == "seed":
                swept[key] = [override.get_value_element_as_str()]
            else:
                common.append(override.input_line)
        seeds = swept.pop("seed", None)
        if seeds is not None and not all(seed.lstrip("-").isdigit() for seed in seeds):
            raise ValueError(f"seed is {','.join(seeds)}; seeds are whole numbers.")
        return common, swept, seeds and [int(seed) for seed in seeds]

    def _pinned(self) -> list[str]:
        """Overrides for threads and device where the user leaves them open. They are part of a
        run's identity, so a study decides them once."""
        import torch

        train, pinned = self.config.train, []
        device = train.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            pinned.append(f"train.device={device}")
        if train.threads is None:
            settings = getattr(self.launcher, "settings", None)
            threads = settings and settings.threads_each(device)
            pinned.append(f"train.threads={threads or torch.get_num_threads()}")
        return pinned

    def _unread(self, overrides: Sequence[str]) -> list[str]:
        """The adapter options that the variant of these overrides never reads."""
        from harness.config.identity import unread_options

        return unread_options(self.composition(overrides).variant)

    def _check_settings(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise ValueError for a mistake that each job would find only when it starts."""
        from harness.config.settings import Settings
        from harness.study.design import key_of

        for arm, config in configs.items():
            Settings.of(config)
            for key in set(map(key_of, self.arms[arm])) & set(self._unread(self.arms[arm])):
                raise ValueError(f"{arm} sets {key}, which its variant ignores; leave it out.")

    def _checked(self, common: Sequence[str], own: Sequence[str]) -> list[str]:
        """The overrides of an arm, all of them, as Hydra takes them. Raises ValueError or
        HydraException if they do not compose, with the nearest match as on the command line."""
        from harness.config.overrides import check_overrides, dotted_keys, with_plus

        given = [*common, *own]
        overrides = list(map(with_plus, given))
        try:
            self._resolved(overrides)
        except (HydraException, OmegaConfBaseException):
            groups = self.composition.group_options()
            check_overrides(given, groups, lambda keys: set(dotted_keys(self._resolved(keys))))
            raise
        return overrides

    def _resolved(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The config that a job with these overrides will see."""
        return self.composition(overrides).resolved

    def _match_parameters(self, configs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The rank, by arm, at which an arm trains as many parameters as the reference, and how
        many these are."""
        from harness.config import build
        from harness.disk.digest import digest
        from harness.study import match

        for arm, overrides in self.arms.items():
            if "rank" in self._unread(overrides):
                raise ValueError(
                    f"match=parameters chooses a rank for every arm, but {arm} ignores rank; leave "
                    "it out, or set hydra.sweeper.match=none."
                )
        bases: dict[str, Any] = {}

        def count(arm: str, rank: int) -> int:
            config = self._resolved([*self.arms[arm], f"rank={rank}"])
            key = digest([config["model"], config["task"]])
            if key not in bases:
                task = build.make(config, "task")
                bases[key] = build.load_base(config, task.labels)
            return match.adapter_parameters(bases[key], build.make(config, "variant"), config)

        reference = self.design.reference
        rank = configs[reference]["rank"]
        matched = match.match_parameters(reference, rank, list(self.arms), count)
        print()
        for arm, found in matched.items():
            print(
                f"matched: {arm} at rank {found['rank']} trains {found['trainable']:,} parameters, "
                f"{found['gap_frac']:.1%} fewer than {reference}"
            )
        return matched

    def _job(self, arm: str, phase: str, seed: int, tuned: Mapping[str, Any]) -> Any:
        """A run of the study. Raises ValueError if its run_dir lies outside the study's folder."""
        from harness.compare.arms import as_text
        from harness.config.overrides import with_plus
        from harness.study.phases import PlannedRun

        values = [with_plus(f"{key}={as_text(value)}") for key, value in tuned.items()]
        if phase == "tune":
            values.append("train.evaluate_test=false")  # what is chosen is chosen without it
        overrides = [*self.arms[arm], *values, f"seed={seed}"]
        config = self._resolved(overrides)
        place = config["run_dir"]
        if place is not None and not Path(place).is_relative_to(self.folder):
            raise ValueError(f"run_dir of {arm} is {place}; it must lie in {self.folder}.")
        return PlannedRun(arm, phase, seed, tuned, overrides, config)


def _value(config: Mapping[str, Any], key: str, arm: str) -> Any:
    """The value of a dotted key. Raises ValueError if there is none."""
    from harness.config.identity import at, has
    from harness.config.overrides import dotted_keys
    from harness.words import did_you_mean

    if not has(config, key):
        hint = did_you_mean(key, dotted_keys(config))
        raise ValueError(f"{arm} has no key {key} to tune.{hint}")
    return at(config, key)
