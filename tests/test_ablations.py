"""A multirun varies what it sweeps: the record, the arms, the curves, and what is said."""

import dataclasses
import json
import re
import shutil
import sys
from itertools import pairwise

import numpy as np
import pytest
from command import CommandLine
from made_multirun import made_runs, write_multirun
from made_study import folder as folder_of
from made_study import made_study, rekeyed, write_run_folders
from scipy import stats as scipy_stats

from harness.compare import __main__ as command
from harness.compare import arms, brief, load, multirun, plots, swept, swept_plots, table
from harness.compare.analyse import analyse
from harness.compare.page import page
from harness.config.identity import control_hash

RANKS = {"rank": [1, 4, 16]}


def saturating(rank: float) -> float:
    return 0.8 - 0.1 / rank


def analysed(study):
    return analyse(study, np.random.default_rng(0))


def recorded(tmp_path, values, score, **settings):
    """The study of a multirun over these values, read from its folder."""
    runs = made_runs(values, score, **settings)
    write_multirun(tmp_path / "default", runs, list(values))
    return load.load_study(tmp_path / "default")


# ---- arms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"rank": [1, 4]}, ["rank=1", "rank=4"]),
        ({"variant": ["dora", "lora"]}, ["lora", "dora"]),
        (
            {"variant": ["lora", "dora"], "rank": [4, 16]},
            ["lora rank=4", "lora rank=16", "dora rank=4", "dora rank=16"],
        ),
        ({"targets": [["query", "value"], "all-linear"]},
         ["targets=['query','value']", "targets=all-linear"]),
        ({"train.batch_size": [32, 8]}, ["train.batch_size=32", "train.batch_size=8"]),
    ],
)  # fmt: skip
def test_arms_are_the_product_of_what_was_swept(tmp_path, values, names):
    study = recorded(tmp_path, values, lambda *_: 0.7)
    assert list(study.arms) == names and study.reference == names[0]
    assert study.primary == names[1:] and study.varied_keys == list(values)
    for run in study.runs:  # each under the name of its own values
        for key, value in study.varied[run.arm].items():
            found = run.config["variant"]["name"] if key == "variant" else at(run.config, key)
            assert found == value
    assert [len(study.runs_of(name, "compare")) for name in names] == [3] * len(names)


def at(config, key):
    for part in key.split("."):
        config = config[part]
    return config


def test_all_but_what_was_swept_is_held(tmp_path):
    runs = made_runs(RANKS, saturating)
    config = {**runs[4].config, "alpha": 32}
    runs[4] = rekeyed(runs[4], config)
    write_multirun(tmp_path / "default", runs, ["rank"])
    with pytest.raises(ValueError, match=r"were not held alike.*alpha: 16 and 32"):
        load.load_study(tmp_path / "default")
    runs = made_runs({"model.dtype": ["float32", "bfloat16"]}, lambda _: 0.7)
    moved = [
        dataclasses.replace(r, result={**r.result, "fingerprints": {
            **r.result["fingerprints"], "base": r.config["model"]["dtype"]}}) for r in runs
    ]  # fmt: skip
    write_multirun(tmp_path / "models", moved, ["model.dtype"])
    assert list(load.load_study(tmp_path / "models").arms) == [
        "model.dtype=float32", "model.dtype=bfloat16",
    ]  # fmt: skip
    moved[0] = dataclasses.replace(moved[0], result={**moved[0].result, "fingerprints": {
        **moved[0].result["fingerprints"], "data": "other"}})  # fmt: skip
    write_multirun(tmp_path / "data", moved, ["model.dtype"])
    with pytest.raises(ValueError, match=r"fingerprints\.data"):
        load.load_study(tmp_path / "data")


def test_a_runs_own_control_hash_stays(tmp_path):
    for run in recorded(tmp_path, RANKS, saturating).runs:
        expected = control_hash(run.config, run.result["fingerprints"])
        assert run.result["control_hash"] == expected and run.config["free"] == []


def test_a_folder_without_a_record_is_understood_where_it_is_a_grid(tmp_path):
    values = {"variant": ["lora", "dora"], "rank": [4, 16]}
    runs = made_runs(values, lambda *_: 0.7)
    write_multirun(tmp_path / "default", runs, list(values))
    known = load.load_study(tmp_path / "default")
    shutil.rmtree(tmp_path / "default/multiruns")
    found = load.load_study(tmp_path / "default")
    assert found.varied == {arm: known.varied[arm] for arm in found.varied}
    assert sorted(found.runs, key=repr) == sorted(known.runs, key=repr)
    assert found.reference == known.reference and found.question == known.question
    coupled = made_runs({"rank": [4, 8], "alpha": [8, 16]}, lambda *_: 0.7)
    coupled = [run for run in coupled if run.config["alpha"] == 2 * run.config["rank"]]
    write_run_folders(dataclasses.replace(known, runs=coupled), tmp_path / "coupled")
    names = list(load.load_study(tmp_path / "coupled").arms)
    assert names == ["alpha=8 rank=4", "alpha=16 rank=8"]  # keys that change together are one


def test_what_is_no_grid_names_the_command(tmp_path, capsys):
    runs = made_runs({"rank": [1, 4, 16], "alpha": [16, 32]}, lambda *_: 0.7)
    kept = [run for run in runs if run.config["alpha"] == 16 or run.config["rank"] == 4]
    write_run_folders(dataclasses.replace(made_study(), runs=kept), tmp_path / "default")
    with pytest.raises(SystemExit) as refused:
        command.main([str(tmp_path / "default")])
    assert "differ in rank (1, 4, 16), alpha (16, 32)" in str(refused.value)
    assert "--varied rank compares the most" in str(refused.value)
    command.main([str(tmp_path / "default"), "--varied", "rank"])
    said = capsys.readouterr().out
    assert "3 other runs in default are left out: are not held alike." in said
    assert "| rank=16 |" in said and "alpha=" not in said.partition("## Scores")[2]
    with pytest.raises(SystemExit, match=r"the key ranks, which no run has\. Did you mean rank"):
        command.main([str(tmp_path / "default"), "--varied", "ranks"])


# ---- several multiruns, and what is left out -----------------------------------------------------


def test_the_last_multirun_is_taken_and_the_others_are_listed(tmp_path, capsys):
    path = tmp_path / "default"
    ranks, alphas = made_runs(RANKS, saturating), made_runs({"alpha": [8, 16]}, lambda _: 0.7)
    single = made_runs({"dropout": [0.3]}, lambda _: 0.7, seeds=2)
    write_multirun(path, ranks, ["rank"], started="2026-11-30T02:00:00")
    write_multirun(path, alphas, ["alpha"], started="2026-11-30T01:00:00")
    write_multirun(path, single, [], name="seed-1", started="2026-11-30T03:00:00")
    study = load.load_study(path)
    assert list(study.arms) == ["rank=1", "rank=4", "rank=16"]  # seeds alone compare nothing
    assert study.notes == ["8 other runs in default are no part of this multirun and left out."]
    command.main([str(path)])
    said = capsys.readouterr().out
    assert "rank-123456 (2026-11-30 02:00:00): rank, 9 runs (this one)" in said
    assert "alpha-123456 (2026-11-30 01:00:00): alpha, 6 runs\n" in said
    command.main([str(path), "--multirun", "alpha-123456"])
    assert "| alpha=16 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"no multirun alpha-1; there are .*Did you mean alpha-12"):
        command.main([str(path), "--multirun", "alpha-1"])
    with pytest.raises(SystemExit, match="every combination"):
        command.main([str(path), "--multirun", "all"])


def test_each_multirun_of_a_folder_is_a_study_of_its_own(tmp_path):
    path, out = tmp_path / "default", tmp_path / "results"
    write_multirun(path, made_runs(RANKS, saturating), ["rank"], started="1")
    command.main([str(path), "--out", str(out)])
    write_multirun(path, made_runs({"alpha": [8, 16]}, lambda _: 0.7), ["alpha"], started="2")
    both = [load.load_study(path, named=f"{key}-123456").name for key in ("rank", "alpha")]
    assert both == ["default-rank-123456", "default-alpha-123456"]
    refused = r"holds the study default-rank-123456, not default-alpha-123456; give another --"
    for option in ("--out", "--archive"):
        with pytest.raises(SystemExit, match=refused + option[2:]):
            command.main([str(path), option, str(out)])
    shutil.rmtree(path / "multiruns")
    assert load.load_study(path, varied=["rank"]).name == "default-rank"
    text = (out / "study.yaml").read_text()  # an archive of before is called what it was called
    (out / "study.yaml").write_text(text.replace(both[0], "default"))
    assert load.load_study(out).name == "default"
    command.main([str(out), "--out", str(out)])


def test_what_is_missing_is_counted(tmp_path):
    path, runs = tmp_path / "default", made_runs(RANKS, saturating)
    failed = {**runs[8].result, "status": "failed", "failure": "BrokenLaw", "reason": "a law"}
    runs[8] = dataclasses.replace(runs[8], result=failed, correct=None)
    write_multirun(path, runs, ["rank"], inapplicable=2)
    (path / folder_of(runs[3]) / "result.json").unlink()  # interrupted
    shutil.rmtree(path / folder_of(runs[4]))  # never begun
    study = load.load_study(path)
    assert study.notes[0].startswith("2 of 9 runs of this multirun have no result (rank=4 seed=0; ")
    assert study.notes[1].startswith("2 jobs of this multirun did not apply")
    said = "\n".join(analysed(study).warnings)
    assert study.notes[0] in said and "1 run failed and is left out (rank=16 compare seed 2" in said
    for run in runs:
        (path / folder_of(run) / "result.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"no run of the multirun rank-123456 .* train\.py -m"):
        load.load_study(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"members": 3}', '{"members": [{}]}'])
def test_a_damaged_record_is_one_sentence(tmp_path, text):
    write_multirun(tmp_path / "default", made_runs(RANKS, saturating), ["rank"])
    (tmp_path / "default/multiruns/rank-123456.json").write_text(text)
    with pytest.raises(SystemExit, match=r"rank-123456\.json is no record of a multirun"):
        command.main([str(tmp_path / "default")])


def test_a_run_is_recognised_whatever_it_settles_when_it_starts():
    config = made_runs({"rank": [4]}, saturating)[0].config
    asked = multirun.asked(config)
    member = multirun.Member(values={}, seed=0, asked=asked, threads=None, device="auto")
    for train in ({"threads": 7}, {"device": "cuda"}, {"log_every": 1}):
        assert member.is_run({**config, "train": {**config["train"], **train}})
    assert not member.is_run({**config, "rank": 8})
    fixed = dataclasses.replace(member, threads=2, device="cpu")
    assert not fixed.is_run(config)  # which has one thread


def test_an_ablation_is_archived_and_made_again(tmp_path):
    study = recorded(tmp_path, RANKS, saturating)
    command.main([str(tmp_path / "default"), "--out", str(tmp_path / "results")])
    again = load.load_study(tmp_path / "results")
    assert again == study
    kept = tmp_path / "kept/runs.jsonl"
    for _ in range(2):
        command.main([str(tmp_path / "default"), "--archive", str(kept)])
    assert load.load_study(kept.parent).varied == study.varied
    text = (tmp_path / "results/page.html").read_text()
    assert "varied: rank (1, 4, 16)" in text and 'id="varied"' in text


# ---- curves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "geometric"),
    [
        ([1, 4, 16], True), ([1, 2, 4, 8, 16, 32, 64], True), ([1e-4, 3e-4, 1e-3], True),
        ([1, 2, 3, 4], False), ([0.1, 0.2, 0.3], False), ([0, 0.1], False), ([0, 1, 4, 16], False),
        ([8, 32], True), ([8, 16], False), ([-1, 1, 2], False), ([1, 2, 5, 10, 20], True),
    ],
)  # fmt: skip
def test_the_axis_is_logarithmic_where_the_values_are_geometric(values, geometric):
    assert swept.is_geometric(values) is geometric


@pytest.mark.parametrize("metric", ["accuracy", "loss_nats"])
@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_smallest_that_cannot_be_told_from_the_best_by_scipy(tmp_path, metric, seeds):
    """Paired t tests against the best, at 0.05 over their number."""
    runs = made_runs({"rank": [32, 1, 2, 4, 8, 16]}, saturating, seeds=seeds, noise=0.012)
    if metric == "loss_nats":
        runs = [
            dataclasses.replace(r, result={**r.result, "test": {
                **r.result["test"], "loss_nats": 1 - r.result["test"]["accuracy"]}})
            for r in runs
        ]  # fmt: skip
    write_multirun(tmp_path / "default", runs, ["rank"])
    study = load.load_study(tmp_path / "default", metric=metric)
    (found,) = analysed(study).responses
    values = [1, 2, 4, 8, 16, 32]
    scores = {v: [r.score(metric) for r in study.runs if r.config["rank"] == v] for v in values}
    sign = 1 if metric == "accuracy" else -1
    best = max(values, key=lambda v: sign * np.mean(scores[v]))
    equal = []
    for value in values:
        p = 1.0 if value == best else scipy_stats.ttest_rel(scores[value], scores[best]).pvalue
        equal.append(p >= 0.05 / 5)
    assert found.values == values and found.values[found.best] == best
    assert found.values[found.smallest] == values[equal.index(True)]
    assert [study.varied[arm]["rank"] for arm in found.arms] == values
    for value, gap in zip(values, found.behind, strict=True):
        if value != best:
            d = np.subtract(scores[value], scores[best])
            half = scipy_stats.t.ppf(1 - 0.05 / 10, seeds - 1) * d.std(ddof=1) / np.sqrt(seeds)
            assert (gap.low, gap.high) == pytest.approx((d.mean() - half, d.mean() + half))


def test_pairing_tells_apart_what_single_intervals_do_not(tmp_path):
    """Seeds that differ by far more than ranks do: the differences are paired."""
    runs = made_runs(RANKS, lambda rank: 0.7 + 0.01 * rank / 16, seeds=8, noise=1e-4)
    write_multirun(tmp_path / "default", runs, ["rank"])
    analysis = analysed(load.load_study(tmp_path / "default"))
    (found,) = analysis.responses
    assert found.values[found.smallest] == 16
    first, last = analysis.arms[0].score, analysis.arms[-1].score
    assert first.high > last.estimate  # the bars overlap
    assert analysis.conclusions[0] == (
        "rank: 16 has the best mean of 1, 4, 16, and every smaller value is worse; it is the "
        "largest tried, so more may be better."
    )


def test_one_seed_and_equal_scores_tell_nothing(tmp_path):
    (one,) = analysed(recorded(tmp_path / "a", RANKS, saturating, seeds=1)).responses
    assert one.smallest is None
    alike = analysed(recorded(tmp_path / "b", RANKS, lambda _: 0.7, noise=0.0))
    assert alike.conclusions[0] == "rank: 1, 4, 16 have one and the same mean."
    assert alike.responses[0].smallest == 0


def test_two_keys_have_a_line_each_and_a_grid(tmp_path):
    def score(variant, rank):
        return 0.78 - 0.1 / rank + 0.03 * (variant == "dora")

    values = {"variant": ["lora", "dora"], "rank": [1, 4, 16]}
    study = recorded(tmp_path, values, score, seeds=8)
    analysis = analysed(study)
    assert [(r.key, r.others) for r in analysis.responses] == [
        ("rank", {"variant": "lora"}), ("rank", {"variant": "dora"}),
    ]  # fmt: skip
    grid = table.grid_table(analysis)
    assert list(grid.columns) == ["variant", "rank=1", "rank=4", "rank=16"]
    for row in grid.rows:
        for cell, rank in zip(row[1:], values["rank"], strict=True):
            scores = [r.score("accuracy") for r in study.runs
                      if (r.result["variant"], r.config["rank"]) == (row[0], rank)]  # fmt: skip
            assert cell.startswith(f"{100 * np.mean(scores):.2f} [")
    drawn = plots.figures(analysis)
    assert [name for name in drawn if name.startswith("varied")] == ["varied_rank", "varied_grid"]
    text = page(analysis, drawn)
    assert "Over variant and rank" in text and text.count("Test accuracy over rank") > 1
    assert "n = 8 seeds" in drawn["varied_rank"]


@pytest.mark.parametrize("values", [{"targets": ["all-linear", "query"]}, {"rank": [4]}])
def test_what_is_no_number_has_no_curve(tmp_path, values):
    analysis = analysed(recorded(tmp_path, values, lambda _: 0.7))
    assert not analysis.responses and not [n for n in plots.figures(analysis) if "varied" in n]


def test_a_diverged_value_is_worse_and_drawn(tmp_path):
    runs = made_runs({"variant.lr": [0.001, 0.01, 0.1]}, lambda rate: 0.7)
    for at_, run in enumerate(runs):
        if run.config["variant"]["lr"] == 0.1:
            bad = {**run.result, "status": "failed", "failure": "NonFiniteLoss", "reason": "nan"}
            runs[at_] = dataclasses.replace(run, result=bad, correct=None)
    write_multirun(tmp_path / "default", runs, ["variant.lr"])
    analysis = analysed(load.load_study(tmp_path / "default"))
    (found,) = analysis.responses
    assert found.behind[2].high < 0
    assert "varied_variant_lr" in plots.figures(analysis)


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_intervals_are_inside_of_the_figure_or_end_in_an_arrow(tmp_path, seeds):
    analysis = analysed(recorded(tmp_path, RANKS, saturating, seeds=seeds, noise=0.1))
    (drawing,) = (d for d in swept_plots.over_values(analysis) if d.name == "varied_rank")
    (ax,) = drawing.figure.axes
    low, high = ax.get_ylim()
    for arm in analysis.arms:
        for end, arrow in ((arm.score.low, "v"), (arm.score.high, "^")):
            inside = low < 100 * end < high
            at_edge = [
                line for line in ax.lines if line.get_marker() == arrow
                and line.get_xdata() == [analysis.study.varied[arm.name]["rank"]]
            ]  # fmt: skip
            assert bool(at_edge) is not inside
    outside = any(line.get_marker() in ("v", "^") for line in ax.lines)
    assert ("An arrow: more lies outside." in drawing.caption) is outside
    assert outside is (seeds == 2)


def test_numbers_below_the_axes_keep_apart(tmp_path):
    runs = made_runs(RANKS, saturating, seeds=2)
    wide = [
        dataclasses.replace(run, result={**run.result, "parameters": {
            **run.result["parameters"], "trainable": 42_000 * run.config["rank"]}})
        for run in runs
    ]  # fmt: skip
    write_multirun(tmp_path / "default", wide, ["rank"])
    drawn = plots.figures(analysed(load.load_study(tmp_path / "default")))
    assert ">250k<" in drawn["cost_parameters"] and "00000" not in drawn["cost_parameters"]


# ---- the table at the end ------------------------------------------------------------------------


def test_the_table_at_the_end(tmp_path, capsys):
    write_multirun(tmp_path / "default", made_runs(RANKS, saturating, seeds=8), ["rank"])
    brief.conclude(tmp_path / "default", "rank-123456", {})
    said = capsys.readouterr().out.strip()
    analysis = analysed(load.load_study(tmp_path / "default"))
    lines = said.splitlines()
    assert lines[0] == "varied: rank (1, 4, 16); all else was held alike."
    columns = "arm n test accuracy (%) 95 % interval minus rank=1, paired (points)"
    assert " ".join(lines[2].split()) == columns
    for line, arm in zip(lines[3:6], analysis.arms, strict=True):
        interval = table.score_interval(arm.score, "accuracy")
        assert line.split()[:2] == [arm.name, "8"] and interval.replace(" ", "") in line.replace(
            " ", ""
        )
    for line, one in zip(lines[4:6], analysis.comparisons, strict=True):
        assert line.endswith(table.difference_interval(one.difference, "accuracy"))
    assert analysis.conclusions[0] in said
    own = f"compare {tmp_path / 'default'} --multirun rank-123456"
    assert said.endswith(f"page: python -m harness.{own} --out results/rank-123456")
    brief.conclude(tmp_path / "default", "rank-123456", {"mode": "offline"})
    assert capsys.readouterr().out.strip() == f"{said}\nW&B: python -m harness.{own} --wandb"


def test_a_multirun_that_cannot_be_compared_says_why(tmp_path, capsys):
    runs = made_runs(RANKS, saturating)
    runs[4] = rekeyed(runs[4], {**runs[4].config, "alpha": 32})
    write_multirun(tmp_path / "default", runs, ["rank"])
    brief.conclude(tmp_path / "default", "rank-123456", {"mode": "online"})
    assert re.fullmatch(r"\nno table: .*alpha.*\n", capsys.readouterr().out)


@pytest.mark.parametrize("package", ["scipy", "matplotlib"])
def test_a_missing_package_is_a_sentence(tmp_path, capsys, monkeypatch, package):
    write_multirun(tmp_path / "default", made_runs(RANKS, saturating), ["rank"])
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    missing = f'{package} is missing; pip install -e ".[pages]"'
    if package == "scipy":
        brief.conclude(tmp_path / "default", "rank-123456", {})
        assert capsys.readouterr().out == f"\nno table: {missing}\n"
    with pytest.raises(SystemExit, match=f"^error: {re.escape(missing)}$"):
        command.main([str(tmp_path / "default"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ---- for real ------------------------------------------------------------------------------------


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


QUICK = ("train.steps=1", "train.eval_every=1", "task.max_tokens=8")
PROCESSES = ("hydra/launcher=processes", "hydra.launcher.preload=[harness.models.hf]")


@pytest.mark.long
def test_a_real_ablation(cli, capsys):
    """Two keys; repeated, nothing runs again; a single run beside it is left out and counted."""
    sweep = ("-m", "rank=1,4", "variant=lora,full", "seed=0,1", *QUICK, *PROCESSES)
    assert cli(*sweep, "hydra.launcher.n_jobs=2") == 0, cli.err
    assert "4 done, 4 n/a" in cli.out
    assert "varied: rank (1, 4); all else was held alike." in cli.out
    assert "4 jobs of this multirun did not apply" in cli.out and "minus rank=1" in cli.out
    (file,) = (cli.root / "outputs/default/multiruns").iterdir()
    record = json.loads(file.read_text())
    assert record["keys"] == ["rank"] and "variant=lora" in record["overrides"]
    assert [m["values"] for m in record["members"]] == [{"rank": 1}] * 2 + [{"rank": 4}] * 2
    again = (*sweep[:3], "seed=1,0", *sweep[4:], "train.log_every=1")  # the same question
    assert cli(*again, "hydra.launcher.n_jobs=2") == 0 and "4 skipped" in cli.out
    assert len(list(file.parent.iterdir())) == 1
    assert cli("seed=7", *QUICK) == 0, cli.err
    command.main([str(cli.root / "outputs/default")])
    said = capsys.readouterr().out
    assert "1 other run in default is no part of this multirun and left out." in said
    assert "| rank=4 |" in said


def test_a_multirun_of_another_launcher_is_recorded_and_a_failed_job_counted(cli):
    code = cli("-m", "dropout=0,0.1,7", "seed=0,1", *QUICK)  # 7 is no probability
    assert code == 1 and "dropout" in cli.err
    (record,) = multirun.read_all(cli.root / "outputs/default")
    assert record.keys == ["dropout"] and len(record.members) == 6
    assert "2 of 6 runs of this multirun have no result (dropout=7 seed=0" in cli.out
    assert "dropout=0.1" in cli.out and "minus dropout=0, paired" in cli.out


@pytest.mark.parametrize("sweeper", ["basic", "fair"])
@pytest.mark.parametrize("key", ["train.log_every", "tracking.notes"])
def test_a_key_that_changes_no_result_is_not_swept(cli, sweeper, key):
    given = ("rank=1,4", f"{key}=1,2", "tracking=offline", f"hydra/sweeper={sweeper}")
    assert cli("-m", *given, *QUICK) == 1
    assert cli.err == f"error: {key} is swept, and changes no result: all its runs are the same. " \
        "Give it one value.\n"  # fmt: skip
    assert not list(cli.root.rglob("run.json")) and not list(cli.root.rglob("multiruns"))


def test_nothing_is_recorded_of_a_dry_run(cli):
    assert cli("-m", "rank=1,4", "dry_run=true", *QUICK) == 0, cli.err
    assert not list(cli.root.rglob("multiruns"))


def test_ranks_that_rise_are_named_in_their_order():
    names = [arms.name_of({"rank": rank}) for rank in (1, 4, 16, 64)]
    assert sorted(names, key=arms.natural) == names
    assert all(a != b for a, b in pairwise(names))
