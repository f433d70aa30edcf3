"""hydra/sweeper=fair from the command line: mostly with runs that are made up, once for real."""

import copy
import functools
import json
import math
import os
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from command import CommandLine
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.plugins import Plugins
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import train
from harness.compare.analyse import analyse
from harness.compare.load import load_study
from harness.compare.report import archive
from harness.config import overrides
from harness.config.identity import control_hash, run_key
from harness.disk.inputs import record
from harness.loop.folder import RunFolder
from harness.study.index import RunIndex

CONF = Path(__file__).parent.parent / "conf"
STUDIES = sorted(
    file.stem for file in (CONF / "experiment").glob("*.yaml") if "sweeper" in file.read_text()
)
FAIR = ("-m", "hydra/sweeper=fair", "hydra/launcher=basic")
THREE = "hydra.sweeper.tune={variant.lr:{multipliers:[0.1,1,10]}}"
ONE = "hydra.sweeper.tuning_seeds=[100]"
UNTUNED = "hydra.sweeper.tune={}"
COMPOSED: dict[tuple, DictConfig] = {}  # by Hydra, for all tests: it takes its time


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    made = CommandLine(tmp_path, monkeypatch, capsys)
    made.defaults = [default.replace(f"{tmp_path}/", "") for default in made.defaults]
    return made


@pytest.fixture
def reports(monkeypatch) -> list[Path]:
    """The studies for which a report was asked, in place of writing it."""
    asked: list[Path] = []
    monkeypatch.setattr(
        "harness.compare.report.write_report", lambda folder, *_, **__: asked.append(folder)
    )
    monkeypatch.setattr("harness.compare.brief.text", str)
    return asked


@functools.cache
def fingerprint(task: str) -> str:
    return instantiate(json.loads(task), _convert_="all").fingerprint


class MadeRuns:
    """A launcher whose jobs write what train.run would, at once, scored by a parabola in log rate.

    BEST is the best rate by variant; a rate above `limit` diverges, and so does a run that is in
    `diverges`; `broken` jobs write nothing.
    """

    BEST: ClassVar = {"lora": 3e-3, "dora": 1e-3, "full": 1e-4, "lora_plus": 5e-4, "adalora": 2e-3}
    COSTS: ClassVar = {
        "parameters": {"trainable": 8, "trainable_final": 8},
        "time": {"train_s": 1.0, "step_median_s": 0.5, "tokens_per_s": 9.0},
        "memory": {"train_peak_bytes": None, "base_bytes": 32},
    }

    def __init__(self):
        self.started: list[dict] = []
        self.asked: set[tuple] = set()  # threads and device
        self.limit, self.broken = math.inf, lambda config: False
        self.diverges: set[tuple[float, int]] = set()  # (rate, seed)
        self.composed: dict[tuple[str, ...], DictConfig] = {}
        self.files: list[Path] = []  # that a run says it has read

    def launch(self, jobs, initial_job_idx):
        assert jobs
        for config in map(self.compose, jobs):
            index = RunIndex(Path(config["outputs_dir"], self.experiment))
            assert config["force"] or not ((found := index.find(config)) and found.result)
            self.started.append(config)
            self.asked.add((config["train"]["threads"], config["train"]["device"]))
            if not self.broken(config):
                self.write(config)

    def compose(self, overrides) -> dict:
        """As Hydra does, but what jobs share only once."""
        values = [o for o in overrides if o.startswith(("seed=", "variant.lr="))]
        shared = tuple(o for o in overrides if o not in values)
        if shared not in self.composed:
            composed = self.loader.load_sweep_config(self.config, list(shared))
            self.experiment = composed.hydra.runtime.choices.get("experiment") or "default"
            OmegaConf.set_struct(composed, False)
            del composed["hydra"]
            self.composed[shared] = composed
        config = copy.deepcopy(self.composed[shared])
        for key, _, value in (override.partition("=") for override in values):
            OmegaConf.update(config, key, json.loads(value))
        return OmegaConf.to_container(config, resolve=True)

    def write(self, config) -> None:
        name, rate, seed = config["variant"]["name"], config["variant"]["lr"], config["seed"]
        config["train"] |= {"threads": 1, "device": "cpu"}
        prints = {"data": fingerprint(json.dumps(config["task"]))}
        key, hash_ = run_key(config), control_hash(config, prints)
        place = Path(config["outputs_dir"], self.experiment, f"{name}-s{seed}-{key[:8]}")
        folder = RunFolder(Path(config["run_dir"] or place), key, prints, force=config["force"])
        folder.create(config, record(self.files))
        folder.write_json("environment.json", {"commit": None})
        folder.write_lines("metrics.jsonl", [{"step": 2, "eval/accuracy": 0.6, "norm/A/x": 1.5}])
        result = {"status": "complete", "variant": name, "seed": seed, "lr": rate, "classes": 2,
                  "run_key": key, "control_hash": hash_, "fingerprints": prints}  # fmt: skip
        if rate > self.limit or (rate, seed) in self.diverges:
            reason = {"status": "failed", "failure": "NonFiniteLoss", "reason": "diverged"}
            folder.write_json("result.json", {**result, **reason})
            return
        score = max(0.0, 0.8 - 0.03 * math.log10(rate / self.BEST[name]) ** 2 + seed % 2 / 1000)
        scores = {"accuracy": score, "macro_f1": score, "loss_nats": 1 - score, "n": 2}
        splits = ["validation", "test"] if config["train"]["evaluate_test"] else ["validation"]
        rows = [{"split": s, "row": i, "correct": i == 1} for s in splits for i in range(2)]
        folder.write_lines("predictions.jsonl", rows)
        result |= {"test": None, **dict.fromkeys(splits, scores), **self.COSTS, "steps": 2}
        folder.write_json("result.json", result)


@pytest.fixture
def made(monkeypatch, reports) -> MadeRuns:
    runs = MadeRuns()

    def instantiate_launcher(self, *, hydra_context, task_function, config):
        runs.loader, runs.config = hydra_context.config_loader, config
        return runs

    def load(self, config_name, overrides, run_mode, **options):
        key = (run_mode, *overrides)
        if key not in COMPOSED:
            COMPOSED[key] = compose(self, config_name, overrides, run_mode, **options)
        return copy.deepcopy(COMPOSED[key])

    compose = ConfigLoaderImpl.load_configuration
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", load)
    monkeypatch.setattr(Plugins, "instantiate_launcher", instantiate_launcher)
    monkeypatch.setattr(overrides, "check_command_line", lambda arguments, conf: arguments)
    return runs


def written(cli, experiment="default") -> dict:
    return yaml.safe_load((cli.root / f"outputs/{experiment}/study.yaml").read_text())


# ---- a whole study ------------------------------------------------------------------------------


@pytest.mark.long
def test_a_study_of_real_runs(cli, monkeypatch):
    """Two variants x three rates x two seeds, then three fresh ones, to a page; a second call runs
    nothing and makes the same page."""
    asked = (*FAIR, "variant=lora,dora", "seed=0,1,2", "train.steps=2", "train.eval_every=2", THREE)
    command = (*asked, "hydra.sweeper.max_growth=0", "hydra.sweeper.metric=loss_nats")
    assert cli(*command) == 0, cli.err
    study = written(cli)
    assert {len(cli.folders()), len(study["expected"])} == {18}
    for run in study["expected"]:
        config = json.loads((cli.root / "outputs/default" / run["run"] / "run.json").read_text())
        config = config["config"]
        assert (config["variant"]["name"], config["seed"]) == (run["arm"], run["seed"])
        assert config["variant"]["lr"] == run["tuned"]["variant.lr"]
        assert (run["seed"] >= 100) == (run["phase"] == "tune")
        if run["phase"] == "compare":
            assert run["tuned"] == study["chosen"][run["arm"]]["chosen"]
    assert study["arms"] == {"lora": ["variant=lora"], "dora": ["variant=dora"]}
    assert study["reference"] == "lora" and study["seeds"] == [0, 1, 2]
    assert len(load_study(cli.root / "outputs/default").runs) == 18
    report = cli.root / "outputs/default/report"
    page, rows = ((report / name).read_text() for name in ("page.html", "runs.jsonl"))
    assert rows.count("\n") == 18 and "n = 3 paired seeds, exploratory" in page
    figures = {file.stem: file.read_text() for file in (report / "figures").iterdir()}
    assert {"forest", "rate_1_lora", "rate_2_dora"} < set(figures)
    assert all(svg in page for svg in figures.values())
    assert load_study(report).runs == load_study(cli.root / "outputs/default").runs

    monkeypatch.setattr(train, "run", None)
    assert cli(*command) == 0, cli.err
    assert "phase tune: 12 runs, 0 to do" in cli.out and "Launching" not in cli.out
    assert (report / "runs.jsonl").read_text() == rows
    study |= {key: written(cli)[key] for key in ("command", "commit")}
    assert written(cli) == study


def test_every_arm_is_tuned_alike_and_compared_at_its_choice(cli, made, reports):
    assert cli(*FAIR, "variant=lora,dora", "seed=range(0,3)") == 0, cli.err
    study = written(cli)
    chosen = {arm: choice["chosen"]["variant.lr"] for arm, choice in study["chosen"].items()}
    assert chosen == {arm: pytest.approx(made.BEST[arm], rel=5e-3) for arm in chosen}
    assert all(choice["rule"] == "quadratic" for choice in study["chosen"].values())
    assert len(made.started) == 2 * (7 * 2 + 3)
    lora = [c["variant"]["lr"] for c in made.started[:14]]
    assert sorted(set(lora)) == [6.32e-5, 2e-4, 6.32e-4, 2e-3, 6.32e-3, 2e-2, 6.32e-2]
    assert all(c["train"]["evaluate_test"] == (c["seed"] < 100) for c in made.started)
    compared = made.started[28:]
    assert [c["seed"] for c in compared] == [0, 0, 1, 1, 2, 2]
    assert {c["variant"]["lr"] for c in compared} == set(chosen.values())
    assert "lora  quadratic" in cli.out and len(reports) == 1


def test_the_grid_grows_where_the_best_is_at_an_edge_and_growth_is_counted(cli, made):
    made.BEST = {"lora": 2e-3, "dora": 3e-2, "full": 10.0}
    assert cli(*FAIR, "variant=lora,dora,full", "seed=0", THREE, ONE) == 0, cli.err
    chosen = written(cli)["chosen"]
    assert [chosen[arm]["grown"] for arm in ("lora", "dora", "full")] == [0, 1, 2]
    assert [chosen[arm]["bracketed"] for arm in ("lora", "dora", "full")] == [True, True, False]
    assert chosen["dora"]["chosen"]["variant.lr"] == pytest.approx(3e-2, rel=5e-3)
    assert chosen["full"] | {"gap": 0} == {
        "chosen": {"variant.lr": 0.1}, "rule": "argmax", "bracketed": False, "grown": 2, "gap": 0,
    }  # fmt: skip
    assert "full  argmax" in cli.out and "not bracketed" in cli.out
    load_study(cli.root / "outputs/default")  # its budgets are accepted


def test_a_run_that_diverges_is_an_outcome(cli, made, reports):
    made.limit = 0.01
    assert cli(*FAIR, "variant=lora,dora", "seed=0", THREE, ONE) == 0, cli.err
    chosen = written(cli)["chosen"]
    assert chosen["lora"]["rule"] == "argmax" and chosen["lora"]["bracketed"]
    assert chosen["lora"]["chosen"] == {"variant.lr": 2e-3} and len(reports) == 1


def test_a_seed_that_diverges_in_tuning_counts_with_the_score_of_chance(cli, made):
    """Of two at the best rate: the other's score alone would have it chosen."""
    made.BEST = {"lora": 2e-3, "dora": 2e-3}
    made.diverges = {(2e-3, 101)}
    assert cli(*FAIR, "variant=lora,dora", "seed=0", THREE, "hydra.sweeper.max_growth=0") == 0
    chosen = written(cli)["chosen"]
    for arm in ("lora", "dora"):
        assert chosen[arm]["chosen"]["variant.lr"] in (2e-4, 2e-2)
    study = load_study(cli.root / "outputs/default")
    points = {p.tuned["variant.lr"]: p for p in arm_of(study, "lora").tuning.points}
    assert points[2e-3].diverged == 1 and min(points[2e-3].scores) == 0.5
    assert len({len(point.scores) for point in points.values()}) == 1


def arm_of(study, name):
    return next(arm for arm in analyse(study, np.random.default_rng(0)).arms if arm.name == name)


def test_a_failure_of_the_machine_stops_the_study_until_it_is_called_again(cli, made, reports):
    made.broken = lambda config: config["seed"] == 1
    command = (*FAIR, "variant=lora,dora", "seed=0,1,2", UNTUNED)
    assert cli(*command) == 1
    assert "2 of 6 runs did not finish (lora seed 1 has no result; dora seed 1" in cli.err
    assert cli.err.endswith("rerun the same command to continue.\n")
    assert len(made.started) == 6 and not reports
    expected, place = written(cli)["expected"], cli.root / "outputs/default"
    assert sum(not (place / run["run"] / "result.json").is_file() for run in expected) == 2
    made.broken, made.started = lambda config: False, []
    assert cli(*command) == 0, cli.err
    assert [config["seed"] for config in made.started] == [1, 1] and len(reports) == 1
    assert written(cli)["expected"] == expected  # where a run will be is known before


def test_without_a_result_in_tuning_nothing_is_compared(cli, made):
    made.broken = lambda config: config["seed"] == 101
    assert cli(*FAIR, "variant=lora,dora", "seed=0,1", THREE) == 1
    assert "6 of 12 runs did not finish" in cli.err
    assert {config["seed"] for config in made.started} == {100, 101}


def test_what_an_arm_has_no_option_for_is_said_and_left_out(cli, made):
    assert cli(*FAIR, "variant=lora,head", "rank=4", "seed=0,1", UNTUNED, "dry_run=true") == 0
    assert "n/a: rank=4 for head" in cli.out
    made.BEST = {**made.BEST, "head": 1e-3}
    assert cli(*FAIR, "variant=lora,head", "rank=4", "seed=0,1", UNTUNED) == 0, cli.err
    assert {(c["variant"]["name"], c["rank"]) for c in made.started} == {("lora", 4), ("head", 8)}
    own = "hydra.sweeper.arms={a:['variant=lora'],b:['variant=head','rank=4']}"
    assert cli(*FAIR, own, UNTUNED, "outputs_dir=other") == 1
    assert cli.err == "error: b sets rank, which its variant ignores; leave it out.\n"


def test_settings_of_an_experiments_sweeper_can_be_overridden(cli, made):
    command = ("-m", "experiment=aa", "hydra/launcher=basic", "hydra.sweeper.archive=nowhere")
    assert cli(*command) == 1
    assert cli.err == "error: archive: there is no nowhere.\n"


def test_settings_that_no_job_would_take_are_refused_with_the_plan(cli, made):
    assert cli(*FAIR, "variant=lora,dora", "train.steps=-5", "dry_run=true") == 1
    assert cli.err == "error: train.steps is -5; it must be positive.\n" and not made.started


def test_changed_data_are_not_taken_for_the_same_study(cli, made):
    command = (*FAIR, "variant=lora,dora", "seed=0,1", UNTUNED)
    assert cli(*command) == 0, cli.err
    file = cli.root / "data/train.csv"
    file.write_text(file.read_text() + "a new and good film,good\n")
    fingerprint.cache_clear()
    assert cli(*command) == 1
    assert "error: the data changed since lora seed 0 was run" in cli.err
    assert cli(*command, "force=true") == 0, cli.err
    fingerprint.cache_clear()


def test_a_study_asks_the_runs_that_stand_on_a_file_which_changed(cli, made, monkeypatch):
    """By its sha256, though size and time are the same: they are started, and not forced. What they
    do not find to be the same ends the study."""
    weights = cli.root / "model.safetensors"
    weights.write_text("one")
    made.files, asked = [weights], []
    command = (*FAIR, "variant=lora,dora", "seed=0,1", UNTUNED)
    assert cli(*command) == 0, cli.err
    monkeypatch.setattr(made, "launch", lambda jobs, initial_job_idx: asked.extend(jobs))
    assert cli(*command) == 0 and not asked, cli.err
    times = weights.stat()
    weights.write_text("two")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cli(*command) == 1 and len(asked) == 4
    assert not any("force=true" in job for job in asked)
    assert f"lora seed 0 stands on {weights}, which changed since" in cli.err

    def found_to_be_the_same(jobs, initial_job_idx):
        for folder in cli.folders():
            about = json.loads((folder / "run.json").read_text())
            (folder / "run.json").write_text(json.dumps({**about, "inputs": record([weights])}))

    monkeypatch.setattr(made, "launch", found_to_be_the_same)
    assert cli(*command) == 0, cli.err


def test_two_studies_do_not_share_a_folder(cli, made):
    assert cli(*FAIR, "variant=lora,dora", "seed=0,1", UNTUNED) == 0, cli.err
    before = written(cli)
    assert cli(*FAIR, "variant=lora,full", "seed=0,1", UNTUNED, "rank=4") == 1
    assert "holds a study with other arms; give another outputs_dir" in cli.err
    assert cli(*FAIR, "variant=lora,dora", "seed=0,1", UNTUNED, "train.batch_size=2") == 1
    assert "holds a study with other train.batch_size;" in cli.err
    assert written(cli) == before
    assert cli(*FAIR, "variant=lora,dora", "seed=0,1,2", UNTUNED) == 0, cli.err  # more seeds


def test_a_run_that_broke_a_law_is_run_again(cli, made):
    command = (*FAIR, "variant=lora,dora", "seed=0,1", UNTUNED)
    assert cli(*command) == 0, cli.err
    file = next((cli.root / "outputs").rglob("dora-s1-*/result.json"))
    broken = {"status": "failed", "failure": "BrokenLaw", "reason": "the base was written"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **broken}))
    made.started = []
    assert cli(*command) == 0, cli.err
    assert [(c["variant"]["name"], c["seed"], c["force"]) for c in made.started] == [
        ("dora", 1, True)
    ]


def test_threads_and_device_are_decided_once_for_all_runs(cli, made):
    cli.defaults.remove("train.threads=1")
    assert cli(*FAIR, "variant=lora,dora", "seed=0,1", UNTUNED) == 0, cli.err
    assert made.asked == {(torch.get_num_threads(), "cpu")}


def test_force_runs_all_again_but_once(cli, made):
    made.BEST = {"lora": 2e-3, "dora": 3e-2}  # one grows: a second round of the same phase
    command = (*FAIR, "variant=lora,dora", "seed=0,1", THREE, ONE)
    assert cli(*command) == 0, cli.err
    first = len(made.started)
    assert cli(*command, "force=true") == 0, cli.err
    assert len(made.started) == 2 * first == 2 * (2 * 3 + 1 + 4)


def test_an_archive_counts_as_finished(cli, made, reports):
    command = (*FAIR, "variant=lora,dora", "seed=0,1", THREE, ONE)
    assert cli(*command) == 0, cli.err
    before = load_study(cli.root / "outputs/default")
    archive(cli.root / "outputs/default", cli.root / "kept")
    made.started = []
    again = (
        *command,
        "outputs_dir=later",
        "hydra.sweeper.archive=kept",
    )
    assert cli(*again) == 0, cli.err
    assert "10 runs restored" in cli.out and made.started == []
    after = load_study(cli.root / "later/default")
    assert after.runs == before.runs and after.chosen == before.chosen
    assert cli(*again) == 0 and "0 runs restored" in cli.out
    assert cli(*command, "hydra.sweeper.archive=nowhere") == 1
    assert cli.err == "error: archive: there is no nowhere.\n"


def test_an_archive_writes_below_its_study_alone(cli, made, reports):
    command = (*FAIR, "variant=lora,dora", "seed=0,1", UNTUNED)
    assert cli(*command) == 0, cli.err
    archive(cli.root / "outputs/default", cli.root / "kept")
    file = cli.root / "kept/runs.jsonl"
    file.write_text(file.read_text().replace('"variant": "dora"', '"variant": "../../../x"'))
    assert cli(*command, "outputs_dir=later", "hydra.sweeper.archive=kept") == 1
    assert "its result is not that of its config" in cli.err and cli.err.count("\n") == 1
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:  # a name that fits in all
        row["result"]["variant"] = row["config"]["variant"]["name"] = "../../../x"
        row["result"]["run_key"] = run_key(row["config"])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli(*command, "outputs_dir=later", "hydra.sweeper.archive=kept") == 1
    assert "it names folders" in cli.err
    assert not [*cli.root.rglob("x*/run.json"), *cli.root.parent.glob("x*")]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.evaluate_test=false", "a study reports on test"),
        ("hydra.sweeper.seeds=[5,6]", "seeds are given twice"),
        ("hydra.sweeper.tune={train.evaluate_test:{values:[true,false]}}", "cannot be tuned"),
        ("hydra.sweeper.tune={seed:{values:[1,2]}}", "seed cannot be tuned"),
        ("hydra.sweeper.primary=[[a]]", "primary names .*'a'.*; it must be a list of arms"),
    ],
)
def test_what_a_study_cannot_do_is_known_before_it_runs(cli, made, override, said):
    for plan in ("false", "true"):
        command = (*FAIR, "variant=lora,dora", "seed=0,1", f"dry_run={plan}", override)
        assert cli(*command) == 1
        assert re.search(said, cli.err) and cli.err.count("\n") == 1, cli.err
    assert not made.started


@pytest.mark.parametrize("launcher", ["basic", "processes"])
def test_a_place_that_cannot_be_written_is_one_sentence(cli, made, launcher):
    command = (*FAIR[:2], f"hydra/launcher={launcher}", "variant=lora,dora", "seed=0,1", UNTUNED)
    assert cli(*command, "outputs_dir=/proc/nothing") == 1
    assert cli.err.startswith("error: ") and cli.err.count("\n") == 1, cli.err
    assert "/proc/nothing" in cli.err


# ---- arms and keys ------------------------------------------------------------------------------


def test_a_glob_and_a_product_make_arms_and_what_they_vary_is_free(cli, made):
    assert cli(*FAIR, "variant=glob(?ora)", "dropout=0,0.1", "seed=4", UNTUNED) == 0, cli.err
    arms = ["dora dropout=0", "dora dropout=0.1", "lora dropout=0", "lora dropout=0.1"]
    assert list(written(cli)["arms"]) == arms
    assert {config["seed"] for config in made.started} == {4}
    assert all(config["free"] == ["dropout"] for config in made.started)
    assert len({result["control_hash"] for result in map(cli.result, cli.folders())}) == 1


def test_other_keys_and_choices_can_be_tuned(cli, made):
    tune = "hydra.sweeper.tune={dropout:{values:[0.0,0.1]},schedule:{values:[linear,cosine]}}"
    assert cli(*FAIR, "variant=lora,dora", "seed=0", tune, ONE) == 0, cli.err
    first = made.started[:8]
    assert [(c["dropout"], c["schedule"]["_target_"].rpartition(".")[2]) for c in first] == 2 * [
        (0.0, "linear"), (0.0, "cosine"), (0.1, "linear"), (0.1, "cosine")
    ]  # fmt: skip
    assert written(cli)["free"] == ["dropout", "schedule"]
    assert set(written(cli)["chosen"]["lora"]["chosen"]) == {"dropout", "schedule"}


def test_roles_are_named_as_on_the_command_line(cli, made):
    command = ("variant.groups.ratios.B=4,16", "seed=0,1", UNTUNED)
    assert cli(*FAIR, *command) == 0, cli.err
    assert [c["variant"]["groups"]["ratios"]["B"] for c in made.started] == [4, 16, 4, 16]
    assert list(written(cli)["arms"]) == ["variant.groups.ratios.B=4", "variant.groups.ratios.B=16"]


def test_a_repetition_in_its_own_folder_and_seeds_of_its_own(cli, made):
    assert cli("-m", "experiment=aa", "hydra/launcher=basic", "seed=0,1") == 0, cli.err
    study = written(cli, "aa")
    runs = {(run["arm"], run["seed"]): run["run"] for run in study["expected"]}
    assert len(set(runs.values())) == len(made.started) == 8
    assert runs["again", 1] == "again-s1" and runs["lora", 1].startswith("lora-s1-")
    assert {seed for arm, seed in runs if arm == "other_seeds"} == {1000, 1001}
    assert study["chosen"] == {} and study["tuning_seeds"] == [] and study["primary"] == []


def test_one_run_may_serve_two_arms(cli, made):
    assert cli("-m", "experiment=fixed_rate_trap", "hydra/launcher=basic", "seed=0,1") == 0, cli.err
    expected = written(cli, "fixed_rate_trap")["expected"]
    distinct = {(c["variant"]["name"], c["variant"]["lr"], c["seed"]) for c in made.started}
    assert len(expected) == 32 and len(made.started) == len(distinct) <= 32
    assert len({run["run"] for run in expected}) == len(distinct)


# ---- matching -----------------------------------------------------------------------------------


def test_ranks_must_match_unless_they_are_swept(cli, made):
    assert cli(*FAIR, "variant=lora,full", "rank=8", "seed=0,1", "dry_run=true") == 0, cli.err
    swept = ("variant=lora", "rank=4,8", UNTUNED)
    assert cli(*FAIR, *swept, "seed=0,1", "hydra.sweeper.match=rank") == 1
    assert "error: match=rank: rank of rank=8 is 8, that of rank=4 4; set them alike" in cli.err
    assert cli(*FAIR, *swept, "seed=0") == 0, cli.err
    assert [config["rank"] for config in made.started] == [4, 8]
    study = load_study(cli.root / "outputs/default")
    assert study.varied == {"rank=4": {"rank": 4}, "rank=8": {"rank": 8}}
    assert study.match == "none"


def test_parameters_are_matched_by_the_rank(cli, made):
    """Thirteen layers of the tiny model: 1004 parameters for each rank, and a magnitude for each of
    the 502 outputs, so that 7 x 1004 + 502 <= 8 x 1004."""
    matched = "hydra.sweeper.match=parameters"
    assert cli(*FAIR, "variant=lora,dora,lora_plus", matched, "seed=0", UNTUNED) == 0, cli.err
    study = written(cli)
    assert study["matched"] == {
        "lora": {"rank": 8, "trainable": 8032, "gap_frac": 0.0},
        "dora": {"rank": 7, "trainable": 7530, "gap_frac": 1 - 7530 / 8032},
        "lora_plus": {"rank": 8, "trainable": 8032, "gap_frac": 0.0},
    }
    assert "dora at rank 7 trains 7,530 parameters, 6.2% fewer than lora" in cli.out
    assert [c["rank"] for c in made.started] == [8, 7, 8] and study["free"] == ["rank"]
    assert study["arms"]["dora"] == ["variant=dora", "rank=7"]
    assert cli(*FAIR, "variant=lora,full", matched, "seed=0", UNTUNED) == 1
    assert "error: match=parameters chooses a rank for every arm, but full ignores rank" in cli.err


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("-m", "experiment=variants_movie", "dropout=0,0.1"),
            "this experiment names its arms, so dropout cannot be swept as well",
        ),
        (
            ("-m", "experiment=variants_movie", "variant=dora"),
            "the arms of this study set variant themselves; leave variant=dora out.",
        ),
        ((*FAIR, "variant=lora,dora", "seed=0,x"), "seed is 0,x; seeds are whole numbers."),
        ((*FAIR, "variant=lora,dora", "rank=interval(1,8)"), "is no list of values"),
        ((*FAIR, "variant=lora,dora", "rate_test=true"), "rate_test plots one run's loss"),
        (
            (*FAIR, "variant=lora,dora", "hydra.sweeper.tune={variant.rl:{values:[1,2]}}"),
            "lora has no key variant.rl to tune. Did you mean variant.lr?",
        ),
        (
            (*FAIR, "hydra.sweeper.arms={a:['variant=dorra'],b:['variant=lora']}"),
            "there is no variant=dorra; there are",
        ),
        (
            (*FAIR, "hydra.sweeper.arms={a:['variant.adapter.rnk=4'],b:['variant=dora']}"),
            "there is no key variant.adapter.rnk. Did you mean variant.adapter.rank?",
        ),
        (
            (*FAIR, "variant=lora,dora", "run_dir=elsewhere"),
            "run_dir of lora is elsewhere; it must lie in ",
        ),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_run(cli, made, overrides, message):
    assert cli(*overrides) == 1
    assert cli.err.startswith("error: ") and message in cli.err and cli.err.count("\n") == 1
    assert not made.started and not (cli.root / "outputs").exists()


def test_runs_may_not_share_a_folder(cli, made):
    place = "run_dir=outputs/default/here"
    assert cli(*FAIR, "variant=lora,dora", "seed=0", UNTUNED, place) == 1
    assert "several runs of dora have the run_dir" in cli.err and "run_dir=...-${seed}" in cli.err
    assert not made.started


def test_missing_data_is_one_sentence_and_no_job(cli, made):
    assert cli(*FAIR, "variant=lora,dora", "seed=0", UNTUNED, "task.files.train=no.csv") == 1
    assert cli.err == "error: no.csv: cannot be read: No such file or directory.\n"
    assert not made.started


# ---- the experiments ----------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", STUDIES)
def test_the_plan_of_every_study_is_printed(cli, made, experiment):
    assert cli.exactly("-m", f"experiment={experiment}", "dry_run=true") == 0, cli.err
    assert cli.out.startswith(f"study {experiment}: ")
    assert "\nwarning" not in cli.out
    assert not made.started and not (cli.root / "outputs").exists()


def test_the_protocol_is_in_the_studies():
    def sweeper(experiment):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", [f"experiment={experiment}"], return_hydra_config=True)
            return config.hydra.sweeper, config

    movie, config = sweeper("variants_movie")
    assert list(movie.arms) == ["lora", "lora_plus", "adalora", "adalora_budget", "dora", "qlora",
                                "full", "head"]  # fmt: skip
    assert movie.primary == ["lora_plus", "adalora", "adalora_budget", "dora", "qlora"]
    ratio, _ = sweeper("lora_plus_ratio")
    products = []
    for arm in ratio.arms.values():
        values = dict(override.split("=") for override in arm)
        rate, times = float(values["variant.lr"]), float(values["variant.groups.ratios.B"])
        products.append(math.sqrt(rate * rate * times))
    assert products == pytest.approx([2e-3] * 6)
    std4, again = sweeper("lora_plus_ratio_std4")
    assert std4.arms == ratio.arms and again.variant.adapter.init_gain == 4.0
    trap, trapped = sweeper("fixed_rate_trap")
    assert len(trap.arms) == 16 and trapped.train == config.train  # so that runs can be reused
    assert len({dict(o.split("=") for o in arm)["variant.lr"] for arm in trap.arms.values()}) <= 4
    ranks, _ = sweeper("rank")
    scales = [dict(o.split("=") for o in arm) for arm in ranks.arms.values()]
    assert {int(arm["alpha"]) / int(arm["rank"]) for arm in scales} == {2.0}


def test_what_an_arm_interpolates_is_resolved_in_its_jobs(cli, made):
    a, b = "['variant=adalora','variant.adapter.min_rank=${rank}']", "['variant=lora']"
    arms = f"hydra.sweeper.arms={{a:{a},b:{b}}}"
    assert cli(*FAIR, arms, "rank=4", "seed=0", UNTUNED) == 0, cli.err
    assert made.started[0]["variant"]["adapter"]["min_rank"] == 4
    assert written(cli)["arms"]["a"] == ["variant=adalora", "variant.adapter.min_rank=${rank}"]


def test_an_experiment_of_a_study_is_an_overlay_of_a_single_run_too(cli, monkeypatch):
    started = []
    monkeypatch.setattr(train, "run", lambda config, **_: started.append(config))
    assert cli.exactly("experiment=variants_movie", "variant=dora", "train.steps=7") == 0, cli.err
    (config,) = started
    assert config["variant"]["name"] == "dora"
    assert (config["train"]["steps"], config["train"]["batch_size"]) == (7, 16)
