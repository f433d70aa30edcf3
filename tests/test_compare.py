"""From runs on disk to tables: what is read, refused, concluded and written."""

import csv
import dataclasses
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
import yaml
from command import CommandLine
from made_study import FINGERPRINTS, folder, made_study, rekeyed, write_run_folders
from scipy import stats as scipy_stats

from harness.compare import __main__ as command
from harness.compare import arms, load, plan, plots, report, table
from harness.compare.analyse import analyse, pooled
from harness.compare.findings import Analysis
from harness.compare.held import check_budgets, check_held
from harness.compare.plain import plain_study
from harness.compare.rows import row
from harness.compare.study import Run, Study, study_text
from harness.config.identity import control_hash

main = command.main


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def study() -> Study:
    return made_study()


def analysed(study: Study) -> Analysis:
    return analyse(study, np.random.default_rng(0))


@pytest.fixture(scope="module")
def whole(study) -> Analysis:
    """The conclusions from the whole made-up study."""
    return analysed(study)


def write_results(study: Study, path):
    """A results folder: study.yaml and runs.jsonl."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "study.yaml").write_text(study_text(study))
    (path / "runs.jsonl").write_text("".join(row(run) + "\n" for run in study.runs))
    return path


def write_outputs(study: Study, path, *, plain=False):
    """outputs/<experiment>: run folders, and study.yaml unless plain."""
    write_run_folders(study, path)
    if not plain:
        (path / "study.yaml").write_text(study_text(study))
    return path


def at_their_folders(study: Study, runs: list[Run]) -> Study:
    """The study with other runs, each expected where `write_run_folders` puts it."""
    expected = [{**row, "run": folder(run)} for row, run in zip(study.expected, runs, strict=True)]
    return dataclasses.replace(study, runs=runs, expected=expected)


def with_result(run: Run, **changes) -> Run:
    return dataclasses.replace(run, result={**run.result, **changes})


def with_scores(study: Study, scores: dict[str, list[float | None]]) -> Study:
    """The comparison runs' test scores by arm, in the order of seeds; None drops the run."""
    runs = []
    for run in study.runs:
        wanted = scores.get(run.arm) if run.phase == "compare" else None
        if wanted is None:
            runs.append(run)
        elif (value := wanted[list(study.seeds).index(run.seed)]) is not None:
            test = {**run.result["test"], study.metric: value}
            runs.append(with_result(run, test=test))
    return dataclasses.replace(study, runs=runs)


def small(**settings) -> Study:
    """Two arms, no tuning, no accidents."""
    defaults = {"arms": ("lora", "dora"), "tuning_seeds": 0, "items": 60, "steps": 100,
                "diverged": False, "failed": False}  # fmt: skip
    return made_study(**{**defaults, **settings})


# ---- reading ------------------------------------------------------------------------------------


def test_rows_come_back_bit_for_bit(study, tmp_path):
    first = write_results(study, tmp_path / "one")
    again = load.load_study(first)
    assert again == study
    second = write_results(again, tmp_path / "two")
    for name in ("runs.jsonl", "study.yaml"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_run_folders_are_the_same_rows(tmp_path):
    """Norms by layer become their mean, predictions the test split's row of 0 and 1."""
    study = made_study(arms=("lora", "dora", "qlora"), seeds=3, items=30, steps=100)
    assert load.load_study(write_outputs(study, tmp_path / "outputs/made")) == study


def test_archived_rows_stand_for_folders_that_are_gone(tmp_path):
    study = made_study(arms=("lora", "dora"), seeds=3, items=30, steps=100, diverged=False)
    half = dataclasses.replace(study, runs=study.runs[:9])
    path = write_outputs(dataclasses.replace(study, runs=study.runs[9:]), tmp_path / "made")
    with pytest.raises(
        ValueError, match=r"9 of 26 runs of the study made are missing: lora \(tune"
    ):
        load.load_study(path)
    (path / "runs.jsonl").write_text("".join(row(run) + "\n" for run in half.runs))
    assert load.load_study(path) == study


def test_a_corrupt_line_is_named(tmp_path):
    study = made_study(arms=("lora", "dora"), seeds=2, tuning_seeds=1, items=30, steps=100)
    path = write_results(study, tmp_path / "made")
    rows = (path / "runs.jsonl").read_text().splitlines(keepends=True)

    def told(line: str, expected: str):
        (path / "runs.jsonl").write_text("".join([*rows[:2], line, rows[3]]))
        with pytest.raises(ValueError, match=expected):
            load.load_study(path)

    told(rows[2][:50] + "\n", r"runs\.jsonl, line 3 is not valid JSON")
    told("[1, 2]\n", r"line 3 is \[1, 2\]; it must be a mapping")
    told('{"arm": "lora"}\n', r"line 3 lacks phase")
    told(rows[2].replace('"status"', '"state"'), r"line 3 lacks status")
    for key, inner, expected in (
        ("result", None, r"line 3: result is 3; it must be a mapping"),
        ("result", "run_key", r"line 3 lacks run_key\."),
        ("result", "fingerprints", r"lacks fingerprints\."),
        ("result", "validation", r"lacks validation\."),
        ("result", "test", r"lacks test\."),
        ("result", "parameters", r"lacks parameters\."),
        ("result", "time", r"lacks time\."),
        ("result", "memory", r"lacks memory\."),
        ("config", None, r"line 3: config is 3"),
        ("config", "free", r"line 3: config lacks free"),
        ("config", "variant", r"line 3: config lacks variant"),
        ("environment", None, r"line 3: environment is 3"),
        ("tuned", None, r"line 3: tuned is 3"),
        ("curve", None, r"line 3: curve is 3; it must be a list"),
        ("correct", None, r"line 3: correct is 3; it must be text"),
    ):
        fields = json.loads(rows[2])
        if inner is None:
            fields[key] = 3
        else:
            del fields[key][inner]
        told(json.dumps(fields) + "\n", expected)
    fields = json.loads(rows[2])
    del fields["result"]["time"]["train_s"]
    told(json.dumps(fields) + "\n", r"lacks time\.train_s\.")
    fields["result"]["time"]["train_s"] = 1.0
    del fields["curve"][0]["step"]
    told(json.dumps(fields) + "\n", r"line 3 lacks curve\.0\.step")
    diverged = next(row for row in rows if "NonFiniteLoss" in row)
    told(diverged.replace('"classes"', '"labels"'), r"lacks classes\.")
    (path / "runs.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        load.load_study(path)


def test_a_corrupt_run_folder_is_named(tmp_path):
    study = small(seeds=2)
    path = write_outputs(study, tmp_path / "made")
    broken = path / folder(study.runs[0])
    predictions = (broken / "predictions.jsonl").read_text()
    (broken / "predictions.jsonl").write_text(predictions[:-5])
    with pytest.raises(ValueError, match=r"predictions\.jsonl, line 64 is not valid JSON"):
        load.load_study(path)
    (broken / "predictions.jsonl").unlink()
    with pytest.raises(ValueError, match=r"predictions\.jsonl is missing"):
        load.load_study(path)
    (broken / "predictions.jsonl").write_text(predictions.replace('"correct"', '"right"', 1))
    with pytest.raises(ValueError, match=r"predictions\.jsonl, line 1 is no prediction"):
        load.load_study(path)
    (broken / "predictions.jsonl").write_text(predictions)
    metrics = (broken / "metrics.jsonl").read_text()
    (broken / "metrics.jsonl").write_text(metrics.replace('"step"', '"stop"', 1))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 lacks step"):
        load.load_study(path)
    (broken / "metrics.jsonl").write_text(metrics)
    (broken / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=rf"{broken.name}/run\.json is \[\]; it must be a mapping"):
        load.load_study(path)


def test_a_setting_may_be_infinite(tmp_path):
    """JSON has no infinity: it is null, in a folder's run as in an archived one."""
    study = small(seeds=2)
    endless = [rekeyed(run, {**run.config, "clip": math.inf}) for run in study.runs]
    path = write_outputs(at_their_folders(study, endless), tmp_path / "outputs/made")
    first = load.load_study(path)
    assert first.runs[0].config["clip"] is None
    assert load.load_study(write_results(first, tmp_path / "made")) == first
    assert json.loads(row(endless[0]))["config"]["clip"] is None


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_score_that_is_no_number_is_one_sentence(tmp_path, value):
    study = small(seeds=2)
    path = write_outputs(study, tmp_path / "made")
    file = path / folder(study.runs[1]) / "result.json"
    result = json.loads(file.read_text())
    result["test"]["macro_f1"] = value
    file.write_text(json.dumps(result))
    with pytest.raises(
        ValueError, match=r"macro_f1 of lora seed 1001 on test is not a finite|no number"
    ):
        load.load_study(path)


def test_a_broken_study_file(tmp_path):
    path = write_results(small(seeds=2), tmp_path / "made")
    text = (path / "study.yaml").read_text()
    for broken, expected in (
        ("{", "not valid YAML"),
        ("3\n", "must be a mapping"),
        (text.replace("reference:", "referense:"), "referense. Did you mean reference"),
        (text.replace("reference: lora\n", ""), "lacks reference"),
        (
            text.replace("reference: lora\n", "reference: lara\n"),
            "no arm lara.*Did you mean lora",
        ),
        (text.replace("metric: accuracy", "metric: acuracy"), "Did you mean accuracy"),
    ):
        (path / "study.yaml").write_text(broken)
        with pytest.raises(ValueError, match=expected):
            load.load_study(path)
    (path / "study.yaml").unlink()
    with pytest.raises(ValueError, match=r"not the study\.yaml that belongs to it"):
        load.load_study(path)


def test_empty_and_foreign_folders(tmp_path):
    with pytest.raises(SystemExit, match="there is no folder"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="holds no finished run"):
        main([str(tmp_path)])
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"result\.json lacks status"):
        main([str(tmp_path)])
    (tmp_path / "result.json").write_text(json.dumps(small(seeds=1).runs[0].result))
    with pytest.raises(SystemExit, match=r"no run\.json"):
        main([str(tmp_path)])


# ---- refusing -----------------------------------------------------------------------------------


def test_runs_not_held_alike_are_refused_by_key(tmp_path):
    study = small(seeds=2)
    run = study.runs[2]
    config = {**run.config, "train": {**run.config["train"], "steps": 400}}
    prints = {**FINGERPRINTS, "data": "ee"}
    prints_of = {"control_hash": control_hash(config, prints), "fingerprints": prints}
    other = rekeyed(with_result(run, **prints_of), config)
    path = write_results(dataclasses.replace(study, runs=[*study.runs[:2], other, *study.runs[3:]]),
                         tmp_path / "made")  # fmt: skip
    with pytest.raises(
        ValueError, match=r"train\.steps: 100 and 400; fingerprints\.data: 'dada.* 'ee'\.$"
    ):
        load.load_study(path)
    # and where nothing asked for them to be in one table
    places = [("outputs/a", study.runs[1]), ("outputs/b", other)]
    with pytest.raises(
        ValueError,
        match=r"train\.steps \(100, 400\).*--varied train\.steps.*outputs_dir=\.\.\. keeps",
    ):
        plain_study("outputs", places)
    unlike = with_result(study.runs[1], fingerprints=prints)  # no setting says it
    with pytest.raises(
        ValueError, match=r"outputs/a and outputs/b were not.*data.*outputs_dir=\.\.\. keeps"
    ):
        plain_study("outputs", [("outputs/a", study.runs[0]), ("outputs/b", unlike)])


@pytest.mark.parametrize("archived", [False, True])
def test_a_run_is_what_the_study_calls_it(tmp_path, archived):
    study = small(seeds=2)
    at = next(i for i, run in enumerate(study.runs) if run.phase == "compare")
    run = study.runs[at]

    def load_with(number: int, other: Run) -> None:
        changed = [*study.runs[:at], other, *study.runs[at + 1 :]]
        write = write_results if archived else write_outputs
        load.load_study(write(at_their_folders(study, changed), tmp_path / f"made{number}"))

    load_with(0, run)
    other_rate = {**run.config["variant"], "lr": 0.05}
    other_name = {**run.config["variant"], "name": "full"}
    swapped = [
        (rekeyed(run, {**run.config, "seed": 9}), "seed is 9, not 1000"),
        (rekeyed(run, {**run.config, "variant": other_rate}), r"variant\.lr is 0\.05, not"),
        (rekeyed(run, {**run.config, "variant": other_name}), "variant is .*full.*, not 'lora'"),
        (with_result(run, run_key="00" * 32), "its result is not that of its config"),
        (with_result(run, seed=7), "its result is not that of its config"),
        (with_result(run, variant="dora"), "its result is not that of its config"),
        (dataclasses.replace(run, config={**run.config, "rank": 4}), "not that of its config"),
    ]
    for number, (other, said) in enumerate(swapped, 1):
        with pytest.raises(ValueError, match=said):
            load_with(number, other)


def test_a_comparison_runs_at_the_rates_that_were_chosen(tmp_path):
    study = small(seeds=2, tuning_seeds=1)
    assert study.chosen
    chosen = {arm: {**c, "chosen": {"variant.lr": 0.123}} for arm, c in study.chosen.items()}
    path = write_results(dataclasses.replace(study, chosen=chosen), tmp_path / "made")
    with pytest.raises(ValueError, match=r"0\.123 was chosen"):
        load.load_study(path)


@pytest.mark.parametrize(
    "field",
    [
        "arms: null", "arms: {lora: x}", "chosen: []", "chosen: {lora: {}}", "expected: 3",
        "expected: [3]", "free: 3", "metric: []", "primary: null", "primary: [[a]]", "seeds: null",
        "reference: []", "tune: x", "tuning_seeds: 3", "commit: 3", "reference_named: 1", "name: 3",
        "expected: [{arm: lora, phase: tune, seed: 1, tuned: {}, run: ../../x}]",
        "expected: [{arm: lora, phase: tune, seed: 1, tuned: {}, run: /etc}]",
    ],
)  # fmt: skip
def test_a_study_yaml_that_nobody_wrote_is_one_sentence(tmp_path, field):
    study = small(seeds=2)
    path = write_results(study, tmp_path / "made")
    file = path / "study.yaml"
    name = field.partition(":")[0]
    kept = yaml.safe_load(file.read_text())
    del kept[name]
    file.write_text(yaml.safe_dump(kept) + field + "\n")
    with pytest.raises(ValueError, match=rf"study\.yaml(: | lacks ){name}|outside of the study"):
        load.load_study(path)


def test_what_one_run_declares_free_is_free_for_all():
    runs = small(seeds=2).runs
    config = {**runs[2].config, "train": {**runs[2].config["train"], "steps": 400}}
    with pytest.raises(ValueError, match=r"train\.steps: 100 and 400"):
        check_held([*runs[:2], dataclasses.replace(runs[2], config=config)])
    config["free"] = ["train.steps"]
    check_held([*runs[:2], dataclasses.replace(runs[2], config=config)])


def test_missing_runs_are_named_with_the_command_that_continues(study, tmp_path):
    path = write_results(dataclasses.replace(study, runs=study.runs[:-2]), tmp_path / "made")
    with pytest.raises(SystemExit) as stop:
        main([str(path)])
    assert stop.value.code == (
        "error: 2 of 130 runs of the study made are missing: "
        "head (compare, seed 1006 variant.lr=0.002), head (compare, seed 1007 variant.lr=0.002); "
        "continue it with: python train.py -m experiment=made"
    )


def test_a_study_stopped_between_its_phases_is_not_finished(study, tmp_path):
    tuning = [run for run in study.runs if run.phase == "tune"]
    expected = [run for run in study.expected if run["phase"] == "tune"]
    half = dataclasses.replace(study, runs=tuning, expected=expected, chosen={})
    path = write_outputs(half, tmp_path / "made")
    with pytest.raises(SystemExit) as stop:
        main([str(path)])
    assert stop.value.code == (
        "error: the tuning of made is not finished; continue it with: "
        "python train.py -m experiment=made"
    )
    main([str(path), "--archive", str(tmp_path / "results/made")])


def test_tuning_budgets_may_differ_by_counted_growth_alone(study, tmp_path):
    assert study.chosen["full"]["grown"] == 2  # and is accepted
    chosen = {**study.chosen, "full": {**study.chosen["full"], "grown": 1}}
    with pytest.raises(ValueError, match=r"budgets differ .*lora 5.*full 6, head 5"):
        check_budgets(dataclasses.replace(study, chosen=chosen))
    with pytest.raises(ValueError, match=r"was tuned at .* with 1 seeds, not with the study's 2"):
        check_budgets(dataclasses.replace(study, runs=study.runs[1:]))


def test_another_reference_and_metric(tmp_path):
    """An arm not named in advance is not tested; a tuned study keeps the metric of its tuning."""
    study = made_study(arms=("lora", "dora", "qlora"), items=30, steps=100)
    path = write_results(study, tmp_path / "made")
    found = load.load_study(path, reference="dora", metric="accuracy")
    assert found.reference == "dora" and found.primary == []
    analysis = analysed(found)
    assert all(c.p is c.simultaneous is None and not c.primary for c in analysis.comparisons)
    assert all(c.difference.low is not None for c in analysis.comparisons)
    assert any("dora was not named in advance" in warning for warning in analysis.warnings)
    assert load.load_study(write_results(found, tmp_path / "again")) == found
    assert load.load_study(path, reference="lora") == study
    assert not any("named in advance" in warning for warning in analysed(study).warnings)
    with pytest.raises(ValueError, match=r"chosen by accuracy on validation.* loss_nats is in the"):
        load.load_study(path, metric="loss_nats")
    untuned = write_results(small(seeds=2), tmp_path / "untuned")
    assert load.load_study(untuned, metric="loss_nats").metric == "loss_nats"
    with pytest.raises(ValueError, match=r"no arm dorra; .*Did you mean dora"):
        load.load_study(path, reference="dorra")
    with pytest.raises(ValueError, match=r"no metric macrof1; .*Did you mean macro_f1"):
        load.load_study(path, metric="macrof1")


# ---- a plain multirun ---------------------------------------------------------------------------


def test_a_plain_multirun_is_a_study_of_what_differs(tmp_path):
    made = made_study(arms=("dora", "lora"), seeds=3, tuning_seeds=0, items=30, diverged=False)
    path = write_outputs(made, tmp_path / "default", plain=True)
    study = load.load_study(path)
    assert list(study.arms) == ["lora", "dora"]  # the default variant comes first
    assert (study.reference, study.primary, study.name) == ("lora", ["dora"], "default")
    assert study.seeds == [1000, 1001, 1002] and study.expected is None and not study.tune
    assert [(run.arm, run.seed) for run in study.runs] == [
        (arm, seed) for arm in ("lora", "dora") for seed in (1000, 1001, 1002)
    ]
    again = load.load_study(write_results(study, tmp_path / "results"))
    assert again == study


def test_a_plain_multirun_is_archived_day_by_day(tmp_path):
    """The second day has another seed and another rank, so that arms are named anew."""
    made = small(seeds=3)

    def ranked(run: Run, rank: int) -> Run:
        config = {**run.config, "rank": rank, "free": ["rank"]}
        return rekeyed(run, config)

    first = [ranked(run, 8) for run in made.runs if run.seed < 1002]
    second = [ranked(run, 8) for run in made.runs if run.seed == 1002]
    second += [ranked(run, 4) for run in made.runs if run.arm == "lora"]
    file = tmp_path / "kept/runs.jsonl"
    for day, runs in enumerate((first, second, second)):
        part = dataclasses.replace(made, runs=runs)
        path = write_outputs(part, tmp_path / f"{day}/default", plain=True)
        main([str(path), "--archive", str(file)])
    whole = dataclasses.replace(made, runs=[*first, *second])
    study = load.load_study(file.parent)
    assert study == load.load_study(write_outputs(whole, tmp_path / "default", plain=True))
    assert list(study.arms) == ["lora rank=4", "dora rank=8", "lora rank=8"]
    assert study.seeds == [1000, 1001, 1002] and len(study.runs) == 9


def test_arms_are_named_by_variant_and_what_is_free():
    def run(name, rank, lr=1e-3, **rest):
        variant = {"name": name, "lr": lr, "adapter": {"rank": rank}}
        config = {"variant": variant, "rank": rank, "free": ["rank"], **rest}
        return dataclasses.replace(made, config=config)

    def names(*runs):
        return [arms.name_of(values) for values in arms.values_of(runs, ["rank"])]

    made = small(seeds=1).runs[0]
    assert names(run("dora", 4), run("dora", 16), run("lora", 4)) == [
        "dora rank=4", "dora rank=16", "lora rank=4",
    ]  # fmt: skip
    assert names(run("dora", 4), run("dora", 16)) == ["rank=4", "rank=16"]
    assert names(run("dora", 4), run("lora", 4)) == ["dora", "lora"]
    rates = [run("dora", 4, 0.001), run("dora", 4, 0.002), run("lora", 4)]
    assert names(*rates) == ["dora variant.lr=0.001", "dora variant.lr=0.002", "lora"]
    assert sorted(["a rank=16", "a rank=4", "a"], key=arms.natural) == [
        "a",
        "a rank=4",
        "a rank=16",
    ]


def test_a_run_kept_twice_is_refused_and_an_unfinished_one_counted(tmp_path):
    made = small(seeds=2)
    path = write_outputs(made, tmp_path / "default", plain=True)
    shutil.copytree(path / folder(made.runs[0]), path / "again")
    with pytest.raises(ValueError, match=r"one run kept twice \(lora, seed 1000\)"):
        load.load_study(path)
    (path / "again/result.json").unlink()
    study = load.load_study(path)
    assert len(study.runs) == 4
    assert study.notes[0].startswith("1 run in default did not finish and is left out (again)")


def test_several_studies_in_one_folder_are_not_one(tmp_path):
    for name in ("one", "two"):
        write_outputs(small(seeds=2), tmp_path / name)
    with pytest.raises(ValueError, match=r"several studies \(one, two\); give one"):
        load.load_study(tmp_path)


def test_a_report_among_the_runs_of_a_plain_multirun_is_no_study(tmp_path, few_files):
    path = write_outputs(small(seeds=2), tmp_path / "default", plain=True)
    report.write_report(path)
    assert len(load.load_study(path).runs) == 4
    report.write_report(path)


def test_a_real_multirun(cli, capsys):
    assert cli("-m", "variant=dora,lora", "seed=0,1", "train.steps=2") == 0, cli.err
    main([str(cli.root / "outputs/default")])
    out = capsys.readouterr().out
    assert "dora at rate 0.002" in out and "n = 2 paired seeds, exploratory" in out
    assert "| lora |" in out and "minus lora (points)" in out
    study = load.load_study(cli.root / "outputs/default")
    for run in study.runs:
        assert len(run.correct) == run.result["test"]["n"] == 14
        assert run.correct.count("1") / 14 == pytest.approx(run.result["test"]["accuracy"])
        assert {"step", "eval/accuracy", "norm/A", "norm/B"} <= set(run.curve[-1])
        assert "outputs_dir" not in run.config
    assert cli("variant=head", "train.steps=1") == 0, cli.err
    with pytest.raises(SystemExit, match=r"differ in train\.steps \(.*--varied train\.steps"):
        main([str(cli.root / "outputs"), "--multirun", "all"])


# ---- what is concluded --------------------------------------------------------------------------


def test_means_and_paired_differences_are_scipys(study, whole):
    found = {c.arm: c for c in whole.comparisons}
    lora, dora = (
        np.array([r.result["test"]["accuracy"] for r in study.runs
                  if r.arm == arm and r.phase == "compare"])
        for arm in ("lora", "dora")
    )  # fmt: skip
    test = scipy_stats.ttest_rel(dora, lora)
    interval, family = test.confidence_interval(0.95), test.confidence_interval(1 - 0.05 / 4)
    c = found["dora"]
    assert (c.difference.low, c.difference.high) == pytest.approx((interval.low, interval.high))
    assert (c.simultaneous.low, c.simultaneous.high) == pytest.approx((family.low, family.high))
    assert c.p == 2 / 2**8 and c.p_holm == 4 * c.p  # every seed has the same sign
    assert c.correlation == pytest.approx(scipy_stats.pearsonr(dora, lora).statistic)
    assert c.detectable == pytest.approx(1.156 * np.std(dora - lora, ddof=1), rel=1e-3)
    for c in whole.comparisons:  # the items' mean is the score, a diverged run's included
        assert c.bootstrap.estimate == c.difference.estimate
        assert c.bootstrap.low < c.bootstrap.estimate < c.bootstrap.high
    head = found["head"]
    assert not head.primary and head.p is head.p_holm is head.simultaneous is None


def test_a_diverged_run_counts_with_the_score_of_chance(study, whole):
    arm = {arm.name: arm for arm in whole.arms}["lora_plus"]
    assert (arm.diverged, arm.failed, arm.score.n) == (1, 0, 8)
    assert arm.scores[1007] == 0.5
    assert arm.tuning.points[-1].scores == [0.5, 0.5] and arm.tuning.points[-1].diverged == 2
    arm = {a.name: a for a in analysed(dataclasses.replace(study, metric="loss_nats")).arms}
    assert arm["lora_plus"].scores[1007] == pytest.approx(math.log(2))


def test_a_failed_run_is_left_out_and_counted(whole):
    arm = {arm.name: arm for arm in whole.arms}["adalora"]
    assert (arm.diverged, arm.failed, arm.score.n) == (0, 1, 7) and 1000 not in arm.scores
    c = {c.arm: c for c in whole.comparisons}["adalora"]
    assert c.difference.n == 7 and c.p is None
    warnings = " ".join(whole.warnings)
    assert "1 run failed and is left out (adalora compare seed 1000: BrokenLaw)" in warnings
    assert "adalora is compared on the 7 seeds that it and lora both have, of 8" in warnings
    assert "needed" in warnings and "no p is printed" in warnings
    assert "| adalora (1 failed) |" in table.markdown(whole)
    assert "| adalora | compare | 1000 | 0.002 | failed |" in table.markdown(whole)
    # It still counts in the family: the others' p are multiplied as if it had one.
    others = {c.arm: c for c in whole.comparisons if c.p is not None}
    assert others["dora"].p_holm == pytest.approx(4 * others["dora"].p)


def test_conclusions_follow_the_bounds():
    rise = [0.80 + 0.01 * i for i in range(8)]
    better = [x + 0.05 + 0.001 * (-1) ** i for i, x in enumerate(rise)]
    even = [x + 0.01 * (-1) ** i for i, x in enumerate(rise)]
    study = small(arms=("lora", "dora", "qlora"))
    text = analysed(with_scores(study, {"lora": rise, "dora": better, "qlora": even})).conclusions
    assert text[0].startswith(
        "dora at rate 0.002 is better than lora by 5.00 points (+5.00 points, 95 % interval "
        "+4.91 to +5.09, n = 8 paired seeds, p = 0.016 (Holm))"
    )
    assert text[1].startswith(
        "qlora at rate 0.002: no difference from lora larger than 0.90 points"  # 0.894, rounded up
    )
    loss = dataclasses.replace(study, metric="loss_nats")
    text = analysed(with_scores(loss, {"lora": rise, "dora": better, "qlora": even})).conclusions
    assert text[0].startswith("dora at rate 0.002 is worse than lora by 0.0500 nats")
    assert "*" not in " ".join(text)


def test_a_difference_that_the_family_does_not_bear_is_undecided():
    base = [0.8] * 8
    weak = [0.8 + d for d in (0.02, 0.01, -0.004, 0.012, 0.015, -0.003, 0.011, 0.001)]
    study = small(arms=("lora", "dora", "qlora", "adalora"))
    scores = {"lora": base, "dora": weak, "qlora": base, "adalora": base}
    text = analysed(with_scores(study, scores)).conclusions
    assert text[0].startswith("taken alone, dora at rate 0.002 is better than lora by")
    assert "; with all 3 comparisons at once it is undecided, [" in text[0]


def test_equal_differences_have_no_known_spread():
    rise = [0.80 + 0.01 * i for i in range(8)]
    scores = {"lora": rise, "dora": [x + 0.02 for x in rise], "qlora": rise}
    study = with_scores(small(arms=("lora", "dora", "qlora")), scores)
    analysis = analysed(study)
    (c, same) = analysis.comparisons
    assert c.difference.low is c.difference.high is c.simultaneous is c.detectable is None
    assert analysis.conclusions[0] == (
        "dora at rate 0.002: all 8 differences from lora are equal (+2.00 points, n = 8 paired "
        "seeds), so their spread is not known and nothing is concluded."
    )
    assert same.difference.low is same.detectable is None
    assert analysis.conclusions[1].endswith(
        "all 8 differences from lora are equal (0.00 points, n = 8 paired seeds), so their spread "
        "is not known and nothing is concluded."
    )
    with pytest.raises(ValueError, match="noise is not known"):
        plan.text(analysis)
    assert next(plots._forest(analysis)).figure.axes


def test_diverged_runs_of_the_reference_are_said():
    study = small(seeds=3)
    runs = [
        with_result(run, status="failed", failure="NonFiniteLoss")
        if run.arm == "lora" and run.seed == 1001
        else run
        for run in study.runs
    ]
    (sentence,) = analysed(dataclasses.replace(study, runs=runs)).conclusions
    assert "n = 3 paired seeds, 1 of lora diverged, exploratory" in sentence


def test_an_anchor_is_said_to_be_one(whole):
    sentences = {s.split()[0]: s for s in whole.conclusions}
    assert "anchor, not tested" in sentences["head"]
    assert "anchor" not in sentences["dora"]


def test_bounds_are_rounded_up():
    assert table.at_most(0.012301, "accuracy") == "1.24 points"
    assert table.at_most(-0.0123, "accuracy") == "1.23 points"
    assert table.at_most(0.00321, "loss_nats") == "0.0033 nats"
    assert table.at_most(0.0, "accuracy") == "0.00 points"


def test_what_other_items_may_turn_is_undecided():
    """Two of ten items make all of the difference; in a third of the resamples none is drawn."""
    study = small(seeds=4, items=10)
    runs = []
    for run in study.runs:
        right = ("1" if run.arm == "dora" else "0") + ("1" if run.seed % 2 else "0") + "1" * 8
        if run.arm == "lora":
            right = "00" + "1" * 8
        test = {**run.result["test"], "accuracy": right.count("1") / 10}
        runs.append(dataclasses.replace(with_result(run, test=test), correct=right))
    analysis = analysed(dataclasses.replace(study, runs=runs))
    assert analysis.comparisons[0].difference.low > 0
    assert analysis.comparisons[0].bootstrap.low == 0
    assert "is better than lora by 15.00 points" in analysis.conclusions[0]
    assert "; over other test items as well it is undecided, [0.00, " in analysis.conclusions[0]
    assert "undecided" not in " ".join(analysed(small(seeds=4, items=400)).conclusions)


def test_without_a_bootstrap_none_is_promised(study):
    def shared(metric: str) -> str:
        analysis = analysed(dataclasses.replace(study, metric=metric))
        return next(w for w in analysis.warnings if "share one test set of 500 items" in w)

    assert "the bootstrap over seeds and items does" in shared("accuracy")
    assert "bootstrap" not in shared("macro_f1")


def test_no_conclusion_about_what_was_not_bracketed(study, whole):
    (sentence,) = [s for s in whole.conclusions if s.startswith("full")]
    assert "nothing is concluded" in sentence and "points" not in sentence
    assert any("full is not bracketed" in w for w in whole.warnings)
    chosen = {**study.chosen, "lora": {**study.chosen["lora"], "bracketed": False}}
    (sentence,) = analysed(dataclasses.replace(study, chosen=chosen)).conclusions
    assert "nothing is concluded about any difference" in sentence


def test_a_tuning_that_had_nothing_to_choose_is_said(study):
    """An arm that does not depend on its rate, and one that has learned nothing."""

    def flat(level: float) -> list[str]:
        runs = [
            dataclasses.replace(run, result={
                **run.result, "validation": {**run.result["validation"], "accuracy": level},
            })
            if run.phase == "tune" and run.arm == "dora" else run
            for run in study.runs
        ]  # fmt: skip
        warnings = analysed(dataclasses.replace(study, runs=runs)).warnings
        return [warning for warning in warnings if "that dora was tuned over" in warning]

    assert not [w for w in analysed(study).warnings if "was tuned over are within" in w]
    (said,) = flat(0.9)
    assert re.fullmatch(r"All \d points that dora .* nothing was chosen by their scores\.", said)
    (said,) = flat(0.5)
    assert said.endswith("which are no better than chance: it has learned nothing.")


def test_one_seed_gives_a_table_without_intervals():
    analysis = analysed(small(seeds=1))
    (c,) = analysis.comparisons
    assert c.difference.n == 1 and c.difference.low is None and c.detectable is None
    assert not analysis.conclusions and "no claim" in " ".join(analysis.warnings)
    assert "[" not in table.markdown_table(table.main_table(analysis))


def test_one_arm_gives_a_table_without_comparisons():
    analysis = analysed(small(arms=("dora",), seeds=3))
    assert not analysis.comparisons and not analysis.conclusions
    assert "one arm only" in analysis.warnings[0]
    assert "minus" not in table.markdown(analysis)


def test_an_arm_that_failed_altogether():
    study = small(arms=("lora", "dora"), seeds=2)
    runs = [
        with_result(run, status="failed", failure="BrokenLaw", reason="?")
        if run.arm == "dora"
        else run
        for run in study.runs
    ]
    analysis = analysed(dataclasses.replace(study, runs=runs))
    assert analysis.arms[1].score.n == 0 and not analysis.comparisons
    assert "| dora (2 failed) | failed | 0 |" in table.markdown(analysis)
    assert table.csv_text(analysis).splitlines()[2].startswith("dora,accuracy,0,,,")


def test_seeds_that_only_one_arm_has_are_not_paired():
    study = with_scores(small(seeds=4), {"dora": [0.8, None, 0.9, 0.8]})
    analysis = analysed(study)
    assert list(analysis.comparisons[0].differences) == [1000, 1002, 1003]
    assert any("on the 3 seeds that it and lora both have, of 4" in w for w in analysis.warnings)


def test_different_scales_at_one_shared_rate_are_pointed_out():
    study = small(seeds=3)
    runs = [with_result(r, effective_scale=16.0) if r.arm == "dora" else r for r in study.runs]
    analysis = analysed(dataclasses.replace(study, runs=runs))
    (warning,) = [w for w in analysis.warnings if "share the rate" in w]
    assert warning.startswith("lora (s = 2) and dora (s = 16) share the rate 0.002")
    assert not any("share the rate" in w for w in analysed(study).warnings)
    three = small(arms=("lora", "dora", "adalora"), seeds=3)
    runs = [with_result(r, effective_scale=16.0) if r.arm == "adalora" else r for r in three.runs]
    runs = [dataclasses.replace(r, result={**r.result, "lr": 2e-3 if r.arm != "lora" else 1e-3})
            for r in runs]  # fmt: skip
    (warning,) = [w for w in analysed(dataclasses.replace(three, runs=runs)).warnings
                  if "share the rate" in w]  # fmt: skip
    assert warning.startswith("dora (s = 2) and adalora (s = 16) share the rate 0.002")


@pytest.mark.parametrize("option", ["--out", "--archive"])
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, option):
    path = write_outputs(small(seeds=2), tmp_path / "outputs/made")
    place = "/proc/nothing" + ("/runs.jsonl" if option == "--archive" else "")
    with pytest.raises(SystemExit, match=r"error: .*/proc/nothing"):
        main([str(path), option, place])


def test_steps_that_were_left_out_are_told():
    study = small(seeds=3)
    runs = [with_result(r, skipped_steps=r.seed - 1000) if r.arm == "dora" else r
            for r in study.runs]  # fmt: skip
    analysis = analysed(dataclasses.replace(study, runs=runs))
    said = "2 runs of dora left out steps whose loss or gradient was not finite, at most 2."
    assert said in analysis.warnings


def test_how_the_arms_are_matched_is_said():
    study = small(seeds=2)
    (warning,) = [w for w in analysed(study).warnings if "not matched" in w]
    assert "dora +6 %" in warning
    matched = {"dora": {"rank": 7, "trainable": 320_000, "gap_frac": 0.0123}}
    study = dataclasses.replace(study, match="parameters", matched=matched)
    assert not any("not matched" in w for w in analysed(study).warnings)
    assert any("at rank 7 it trains 1.2 % fewer than lora" in w for w in analysed(study).warnings)


def test_one_run_with_a_changed_base_is_enough():
    study = small(seeds=2)
    changed = {"before": "aa", "after": "bb"}
    runs = [with_result(study.runs[0], base_fingerprint=changed), *study.runs[1:]]
    assert analysed(study).certificate.base_unchanged
    assert not analysed(dataclasses.replace(study, runs=runs)).certificate.base_unchanged


def test_scales_that_differ_are_not_printed_as_one():
    study = small(seeds=2)
    first, *others = study.runs
    assert analysed(study).arms[0].scale == 2.0
    runs = [first, *(with_result(run, effective_scale=4.0) for run in others)]
    assert analysed(dataclasses.replace(study, runs=runs)).arms[0].scale == "by layer"


def test_what_the_base_says_of_itself_is_said_once():
    study = small(seeds=2)
    note = "Its weights were in 4 bits before."
    runs = [with_result(run, notes=[note] if run.arm == "dora" else []) for run in study.runs]
    assert analysed(dataclasses.replace(study, runs=runs)).warnings.count(note) == 1


def test_environments_may_differ_but_it_is_said():
    study = small(seeds=2)
    other = {**study.runs[1].environment, "python": "3.12.1", "uncommitted_changes": True}
    runs = [study.runs[0], dataclasses.replace(study.runs[1], environment=other), *study.runs[2:]]
    analysis = analysed(dataclasses.replace(study, runs=runs))
    assert any("python 3.11.7, 3.12.1" in w for w in analysis.warnings)
    assert any("1 run had changes" in w for w in analysis.warnings)
    assert analysis.certificate.software["python"] == "3.11.7 (3 runs), 3.12.1 (1 run)"


def test_the_certificate_says_what_was_held(whole):
    certificate = whole.certificate
    assert certificate.held["train.steps"] == 200 and "seed" not in certificate.held
    assert not any(key.startswith("variant") for key in certificate.held)
    assert certificate.free["variant"].startswith("lora, lora_plus")
    assert certificate.base_unchanged and certificate.fingerprints == FINGERPRINTS
    assert certificate.runs == {"tuning": 74, "comparison": 56, "diverged": 3, "failed": 1}
    assert (
        "full: variant.lr at 7 points (2 of them growth at an edge), 14 runs" in certificate.tuned
    )


def test_a_run_that_serves_two_arms_is_one_run():
    study = small(seeds=2)
    twice = [dataclasses.replace(run, arm="dora again") for run in study.runs if run.arm == "dora"]
    shared = dataclasses.replace(study, arms={**study.arms, "dora again": []}, free=["rank"],
                                 runs=[*study.runs, *twice])  # fmt: skip
    certificate = analysed(shared).certificate
    assert certificate.runs == {"tuning": 0, "comparison": 4, "diverged": 0, "failed": 0}
    assert certificate.free["rank"] == "8" and "rank" not in certificate.held


@pytest.mark.parametrize(("metric", "sign"), [("accuracy", 1), ("loss_nats", -1)])
def test_the_band_of_good_rates(metric, sign):
    """By hand: 0.90 at 2e-3; the limit 0.891 is crossed 0.9 of a half decade to the left, and to
    the right not at all. As a loss the same, mirrored at 0.90."""
    study = made_study(arms=("lora", "dora"), seeds=2, items=30, diverged=False)
    study = dataclasses.replace(study, metric=metric)
    wanted = {2e-4: 0.85, 2e-4 * 10**0.5: 0.89, 2e-3: 0.90, 2e-3 * 10**0.5: 0.895, 2e-2: 0.893}
    runs = []
    for run in study.runs:
        value = next(v for rate, v in wanted.items() if math.isclose(rate, run.result["lr"]))
        score = {metric: 0.90 + sign * (value - 0.90)}
        runs.append(with_result(run, validation={**run.result["validation"], **score}))
    arm = analysed(dataclasses.replace(study, runs=runs)).arms[0]
    low, high = arm.tuning.band
    assert high == pytest.approx(2e-2)
    assert math.log10(2e-3 / low) == pytest.approx(0.5 * 0.9)


def test_scores_at_equal_training_time_by_hand():
    """100 steps of 0.5 s against 200 s: at 50 s the slow arm is at step 25 of its curve."""
    study = small(seeds=2)

    def timed(run: Run) -> Run:
        step_s = 0.5 if run.arm == "lora" else 2.0
        curve = [{"step": 20, "eval/accuracy": 0.6}, {"step": 40, "eval/accuracy": 0.7},
                 {"step": 100, "eval/accuracy": 0.9}]  # fmt: skip
        time = {**run.result["time"], "step_median_s": step_s}
        return dataclasses.replace(with_result(run, time=time), curve=curve)

    fast, slow = analysed(dataclasses.replace(study, runs=list(map(timed, study.runs)))).arms
    assert fast.equal_time.estimate == pytest.approx(0.9)
    assert slow.equal_time.estimate == pytest.approx(0.625)
    late = [dataclasses.replace(r, curve=r.curve[-1:]) for r in map(timed, study.runs)]
    assert analysed(dataclasses.replace(study, runs=late)).arms[1].equal_time is None


def test_an_anchor_does_not_set_the_equal_time():
    """100 steps of 0.1 s: it has finished long before the reference, at 50 s."""
    study = small(arms=("lora", "dora", "head"), anchors=("head",), seeds=2)
    step_s = {"lora": 0.5, "dora": 2.0, "head": 0.1}
    runs = [with_result(r, time={**r.result["time"], "step_median_s": step_s[r.arm]})
            for r in study.runs]  # fmt: skip
    lora, dora, head = analysed(dataclasses.replace(study, runs=runs)).arms
    ends = [run.curve[-1]["eval/accuracy"] for run in runs if run.arm == "lora"]
    assert lora.equal_time.estimate == pytest.approx(np.mean(ends))
    assert dora.equal_time is None and head.equal_time is None  # not yet evaluated; over already


def test_costs_are_medians_of_the_comparison_runs(study, whole):
    arms = {arm.name: arm for arm in whole.arms}
    steps = [r.result["time"]["step_median_s"] for r in study.runs
             if r.arm == "adalora" and r.phase == "compare" and r.complete]  # fmt: skip
    assert arms["adalora"].costs.step_s == pytest.approx(np.median(steps))
    assert arms["adalora"].costs.trainable_final < arms["adalora"].costs.trainable
    assert arms["full"].scale is None and arms["dora"].scale == 2.0


def test_noise_from_arms_that_are_the_reference_again():
    study = small(seeds=4)
    lora = [run for run in study.runs if run.arm == "lora"]
    scores = [run.result["test"]["accuracy"] for run in lora]

    def arm(name, run, seed=None, factor=1.0, shift=0.0):
        seed = run.seed if seed is None else seed
        config = json.loads(json.dumps(run.config)) | {"seed": seed}
        config["variant"]["lr"] *= factor
        test = {**run.result["test"], "accuracy": run.result["test"]["accuracy"] + shift}
        time = {**run.result["time"], "train_s": run.result["time"]["train_s"] + 1}
        changed = with_result(run, test=test, seed=seed, time=time)
        return dataclasses.replace(changed, arm=name, seed=seed, config=config)

    shifts = [0.01, -0.01, 0.02, 0.0]
    runs = [
        *lora,
        *(arm("again", run) for run in lora),
        *(arm("nudged", r, factor=1 + 1e-4, shift=s) for r, s in zip(lora, shifts, strict=True)),
        *(arm("others", run, seed=run.seed + 50) for run in lora),
        *(dataclasses.replace(run, arm="itself") for run in lora),
    ]
    names = ("lora", "again", "nudged", "others", "itself")
    aa = dataclasses.replace(study, arms={n: [] for n in names}, primary=[], runs=runs)
    analysis = analysed(aa)
    again, nudged, others, itself = analysis.conclusions
    assert again == "Noise, the same run again (again, n = 4): differences are exactly 0."
    assert f"{100 * np.std(shifts, ddof=1):.2f} points" in nudged and "n = 4" in nudged
    assert f"{100 * math.sqrt(2) * np.std(scores, ddof=1):.2f} points" in others
    assert itself == "itself is lora: the same runs under another name."
    assert not any("no seed in common" in warning for warning in analysis.warnings)
    assert analysis.noise == list(names[1:])
    diverged = {"status": "failed", "failure": "NonFiniteLoss", "time": None}
    lost = [with_result(r, **diverged) if r.seed == 1000 else r for r in runs]  # without a time
    again, *_, itself = analysed(dataclasses.replace(aa, runs=lost)).conclusions
    assert again.startswith("Noise, the same run again (again, n = 4)")
    assert itself == "itself is lora: the same runs under another name."
    broken = [*runs[:4], arm("again", lora[0], shift=0.03), *runs[5:]]
    (again, *_) = analysed(dataclasses.replace(aa, runs=broken)).conclusions
    assert again.endswith("differences are up to 3.00 points, not 0.")


# ---- writing ------------------------------------------------------------------------------------


@pytest.fixture
def few_files(monkeypatch):
    """A report without page and figures, which have their own tests."""
    monkeypatch.setattr(
        report,
        "files",
        lambda analysis: {
            "table.md": table.markdown(analysis),
            "runs.jsonl": "".join(row(run) + "\n" for run in analysis.study.runs),
            "study.yaml": study_text(analysis.study),
            "figures/one.svg": "<svg/>",
        },
    )


def everything(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_report_is_made_again_bit_for_bit(tmp_path):
    study = made_study(arms=("lora", "adalora"), seeds=2, items=40, steps=100)
    first, second = tmp_path / "results/made", tmp_path / "again"
    report.write_report(write_outputs(study, tmp_path / "outputs/made"), first)
    assert set(everything(first)) > {"page.html", "table.md", "table.csv", "runs.jsonl",
                                     "study.yaml", "report_spec.json"}  # fmt: skip
    assert any(name.startswith("figures/") for name in everything(first))
    report.write_report(first, second)
    assert everything(first) == everything(second)


def test_what_is_not_ours_survives_and_old_figures_go(tmp_path, few_files):
    path = write_outputs(small(seeds=2), tmp_path / "outputs/made")
    out = tmp_path / "results/made"
    report.write_report(path, out)
    (out / "README.md").write_text("mine")
    (out / "notes").mkdir()
    (out / "notes/a.txt").write_text("mine too")
    (out / "figures/old.svg").write_text("old")
    report.write_report(path, out)
    assert (out / "README.md").read_text() == "mine" and (out / "notes/a.txt").exists()
    assert not (out / "figures/old.svg").exists()
    before = everything(out)
    report.write_report(out, out)  # remade in its place
    assert everything(out) == before
    assert [p.name for p in out.parent.iterdir()] == ["made"]  # no temporary folder is left


def test_nothing_of_somebody_elses_is_replaced(tmp_path, few_files):
    path = write_outputs(small(seeds=2), tmp_path / "outputs/made")
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    with pytest.raises(SystemExit, match="exists and is not a report"):
        main([str(path), "--out", str(out)])
    assert everything(out) == {"thesis.tex": b"years"}
    other = write_results(dataclasses.replace(small(seeds=2), name="other"), tmp_path / "other")
    with pytest.raises(SystemExit, match="holds the study other, not made; give another --out"):
        main([str(path), "--out", str(other)])


def test_a_report_that_fails_midway_leaves_the_old_one(tmp_path, few_files, monkeypatch):
    path = write_outputs(small(seeds=2), tmp_path / "outputs/made")
    report.write_report(path)
    before = everything(path / "report")

    def broken(analysis):
        raise RuntimeError("no font")

    monkeypatch.setattr(report, "files", broken)
    with pytest.raises(RuntimeError, match="no font"):
        report.write_report(path)
    assert everything(path / "report") == before
    assert not [p for p in path.iterdir() if p.name.startswith(".")]


def test_an_unfinished_study_is_archived_and_continued(tmp_path):
    study = made_study(arms=("lora", "dora"), seeds=3, items=30, steps=100, diverged=False)
    file = tmp_path / "results/made/runs.jsonl"
    days = ((0, 10), (6, 20), (15, len(study.runs)))
    for day, (start, end) in enumerate(days):  # a fresh machine each day
        part = dataclasses.replace(study, runs=study.runs[start:end])
        main([str(write_outputs(part, tmp_path / f"{day}/made")), "--archive", str(file)])
    assert load.load_study(file.parent) == study
    other = dataclasses.replace(study, name="other")
    path = write_outputs(other, tmp_path / "other")
    with pytest.raises(SystemExit, match="holds the study made, not other; give another --arch"):
        main([str(path), "--archive", str(file)])
    file.unlink()  # a study.yaml alone, as beside run folders, is somebody's too
    before = everything(file.parent)
    with pytest.raises(SystemExit, match="holds the study made, not other; give another --arch"):
        main([str(path), "--archive", str(file)])
    assert everything(file.parent) == before
    with pytest.raises(SystemExit, match=r"must be named runs\.jsonl"):
        main([str(path), "--archive", str(tmp_path / "rows.jsonl")])


def test_the_csv_holds_plain_numbers(study, whole):
    rows = list(csv.DictReader(io.StringIO(table.csv_text(whole))))
    assert [row["arm"] for row in rows] == list(study.arms)
    for line, arm in zip(rows, whole.arms, strict=True):
        assert float(line["score"]) == arm.score.estimate and int(line["n"]) == arm.score.n
        assert float(line["base_bytes"]) == arm.costs.base_bytes
    assert rows[0]["difference"] == "" and float(rows[3]["p"]) == 2 / 2**8


def test_numbers_are_printed_sensibly():
    assert table.score(0.82346, "accuracy") == "82.35 %"
    assert table.difference(-0.0045, "macro_f1") == "\N{MINUS SIGN}0.45"
    assert table.difference(-0.00001, "accuracy") == "0.00"
    assert table.difference(0.0032, "loss_nats") == "+0.0032"
    assert table.magnitude(-0.01, "accuracy") == "1.00 points"
    assert table.p_value(0.0078125) == "0.0078" and table.p_value(None) == ""


# ---- planning and pooling -----------------------------------------------------------------------


def test_the_plan_finds_the_seeds_for_a_difference(tmp_path, capsys):
    """By hand: with a standard deviation of 1 point, 1.16 points need 8 seeds, 1.60 at 0.01."""
    unit = np.array([1, 1, 1, 1, -1, -1, -1, -1]) * math.sqrt(7 / 8)
    shape = {"lora": [0.8] * 8, "dora": list(0.8 + 0.01 * unit)}
    study = with_scores(small(), shape)
    text = plan.text(analysed(study), 0.0117)
    assert "| dora | 8 | 1.00 [0.66, 2.04] | 8 |" in text
    path = write_results(study, tmp_path / "made")
    main([str(path), "--plan", "--difference", "0.0117"])
    assert capsys.readouterr().out.strip() == text.strip()
    main([str(path), "--plan"])
    assert "| 0.25 points | 0.50 points |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="must be between 0 and 1"):
        main([str(path), "--plan", "--difference", "1.5"])
    with pytest.raises(ValueError, match="noise is not known"):
        plan.text(analysed(small(seeds=1)))


def test_effects_over_several_studies(tmp_path, capsys):
    base = [0.8] * 8
    up = [0.8 + 0.01 * i for i in range(8)]
    down = [0.8 - 0.005 * i for i in range(8)]
    one = with_scores(small(), {"lora": base, "dora": up})
    two = dataclasses.replace(with_scores(small(), {"lora": base, "dora": down}), name="two")
    effects, left_out = pooled([analysed(one), analysed(two)])
    found = effects["dora"]
    assert not left_out
    means = [(0.01 - 0.005) * i / 2 for i in range(8)]
    expected = scipy_stats.ttest_1samp(means, 0).confidence_interval()
    assert found.estimate == pytest.approx(np.mean(means)) and found.n == 8
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    main([str(write_results(s, tmp_path / s.name)) for s in (one, two)])
    assert "for these tasks only" in capsys.readouterr().out
    with pytest.raises(ValueError, match="have the metrics accuracy and loss_nats"):
        pooled([analysed(one), analysed(dataclasses.replace(two, metric="loss_nats"))])


def test_an_arm_without_a_p_still_counts_in_the_family():
    """For want of seeds; so the other's p is doubled all the same."""
    up = [0.8 + 0.01 * (1 + i % 3) for i in range(8)]
    scores = {"lora": [0.8] * 8, "dora": up, "qlora": [*up[:3], *[None] * 5]}
    found = analysed(with_scores(small(arms=("lora", "dora", "qlora")), scores)).comparisons
    dora, qlora = ({c.arm: c for c in found}[name] for name in ("dora", "qlora"))
    assert (dora.p, dora.p_holm) == (2.0**-7, 2.0**-6)
    assert (qlora.p, qlora.p_holm) == (None, None)


@pytest.mark.parametrize("missing", [{0}, {5, 7}])
def test_effects_are_pooled_over_the_seeds_that_all_studies_have(missing):
    """Whichever of the studies lacks them, and whichever comes first."""
    full = {"lora": [0.8] * 8, "dora": [0.8 + 0.01 * i**1.5 for i in range(8)]}
    less = {"lora": full["lora"],
            "dora": [None if i in missing else 0.7 + 0.003 * i for i in range(8)]}  # fmt: skip
    one = with_scores(small(), full)
    two = dataclasses.replace(with_scores(small(), less), name="two")
    means = [
        (full["dora"][i] - 0.8 + less["dora"][i] - 0.8) / 2 for i in range(8) if i not in missing
    ]
    expected = scipy_stats.ttest_1samp(means, 0).confidence_interval()
    for studies in ((one, two), (two, one)):
        found = pooled([analysed(study) for study in studies])[0]["dora"]
        assert found.n == len(means) and found.estimate == pytest.approx(np.mean(means))
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_what_is_not_pooled_is_named(tmp_path, capsys):
    """An arm that is not bracketed in one study, and one that is the reference again."""
    one = made_study(arms=("lora", "dora", "qlora"), seeds=3, items=60, diverged=False,
                     failed=False)  # fmt: skip
    same = [dataclasses.replace(r, arm="same") for r in one.runs
            if r.arm == "lora" and r.phase == "compare"]  # fmt: skip
    chosen = {arm: {**choice, "bracketed": True} for arm, choice in one.chosen.items()}
    arms = {**one.arms, "same": []}
    one = dataclasses.replace(one, arms=arms, chosen=chosen, runs=[*one.runs, *same])

    def at_edge(arm: str) -> Study:
        chosen = {**one.chosen, arm: {**one.chosen[arm], "bracketed": False}}
        return dataclasses.replace(one, name="two", chosen=chosen)

    analyses = [analysed(one), analysed(at_edge("qlora"))]
    effects, left_out = pooled(analyses)
    assert list(effects) == ["dora"]
    assert left_out == {"qlora": "it is not bracketed in two", "same": "in made it is lora again"}
    text = table.pooled_text(analyses, effects, left_out)
    assert "qlora is left out: it is not bracketed in two." in text
    with pytest.raises(ValueError, match=r"reference lora cannot be pooled: .* bracketed in two"):
        pooled([analysed(one), analysed(at_edge("lora"))])


@pytest.mark.parametrize(
    "options",
    [("--plan", "--out", "x"), ("--archive", "x", "--reference", "dora"),
     ("--archive", "x", "--metric", "loss_nats"), ("--archive", "x", "--out", "y")],
)  # fmt: skip
def test_options_that_would_be_ignored_are_errors(tmp_path, capsys, options):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), *options])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {options[0]} ")


def test_the_study_file_is_yaml_that_people_read(study):
    fields = yaml.safe_load(study_text(study))
    assert fields["reference"] == "lora" and fields["tune"]["variant.lr"]["multipliers"][2] == 1.0
    assert fields["expected"][0]["tuned"] == {"variant.lr": study.runs[0].tuned["variant.lr"]}
