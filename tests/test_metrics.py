"""Metrics of any task: what a result states of them, and a comparison that knows no task."""

import dataclasses
import json
import math

import numpy as np
import pytest
from made_study import folder, made_study, write_run_folders

from harness.compare import load, plots, sentences, table
from harness.compare.analyse import RNG_SEED, analyse
from harness.compare.page import page
from harness.compare.rows import read_folder
from harness.tasks import metrics

STATED = {
    "exact_match": {"higher_is_better": True, "chance": 0.0, "per_item": True},
    "phoneme_error_rate": {"higher_is_better": False, "chance": 1.0, "per_item": False},
    "loss_nats": {"higher_is_better": False, "chance": math.log(259), "per_item": False},
    "perplexity": {"higher_is_better": False, "chance": 259.0, "per_item": False},
}


def language_scores(scores):
    accuracy, loss = scores["accuracy"], scores["loss_nats"]
    return {
        "exact_match": accuracy,
        "phoneme_error_rate": 0.5 * (1 - accuracy),
        "loss_nats": loss,
        "perplexity": math.exp(loss),
        "n": scores["n"],
        "generated": scores["n"],
    }


def language_study(metric="exact_match", **settings):
    """A made-up study of classification as if a language model had answered."""
    made = made_study(arms=("lora", "lora_plus", "dora"), anchors=(), seeds=8, **settings)
    runs = []
    for at, run in enumerate(made.runs):
        result = {**run.result, "classes": None, "metrics": STATED, "primary_metric": "exact_match"}
        if run.complete:
            for split in ("validation", "test"):
                result[split] = result[split] and language_scores(result[split])
            change = 0.01 * (at % 5)
            result["forgetting"] = {
                "loss_nats_before": 3.0, "loss_nats_after": 3.0 + change, "kl_nats": 0.1 + change,
            }  # fmt: skip
        runs.append(dataclasses.replace(run, result=result))
    return dataclasses.replace(made, runs=runs, metric=metric)


def analysed(study):
    return analyse(study, np.random.default_rng(RNG_SEED))


def test_guessing_is_uniform_over_classes_or_vocabulary():
    found = metrics.classification(77)
    assert found["accuracy"].chance == found["macro_f1"].chance == 1 / 77
    assert found["loss_nats"].chance == pytest.approx(-math.log(1 / 77))
    found = metrics.language_modelling(49152)
    assert math.exp(found["loss_nats"].chance) == pytest.approx(49152)
    assert found["perplexity"].chance == 49152 and not found["perplexity"].higher_is_better
    assert math.isnan(metrics.language_modelling(None)["perplexity"].chance)


def test_a_result_of_before_says_its_classes():
    assert metrics.metrics_of({"classes": 2}) == metrics.classification(2)
    stated = {name: metrics.Metric(**fields) for name, fields in STATED.items()}
    assert metrics.metrics_of({"classes": None, "metrics": STATED}) == stated


@pytest.mark.parametrize(
    ("metric", "titled", "score", "difference", "bound"),
    [
        ("accuracy", "accuracy", "82.35 %", "+82.35", "82.35 points"),
        ("macro_f1", "macro F1", "82.35 %", "+82.35", "82.35 points"),
        ("phoneme_error_rate", "phoneme error rate", "82.35 %", "+82.35", "82.35 points"),
        ("loss_nats", "loss", "0.8235 nats", "+0.8235", "0.8235 nats"),
        ("perplexity", "perplexity", "0.82", "+0.82", "0.83"),
    ],
)
def test_a_number_is_written_as_its_metric_is(metric, titled, score, difference, bound):
    value = 0.82346
    assert metrics.title(metric) == titled
    assert table.score(value, metric) == score
    assert table.difference(value, metric) == difference
    assert table.difference(-value, metric) == difference.replace("+", table.MINUS)
    assert table.at_most(-value, metric) == bound
    assert table.score(None, metric) == ""


def test_a_study_of_answers_is_analysed_by_what_its_runs_state():
    study = language_study()
    assert study.higher_is_better and list(study.metrics) == list(STATED)
    analysis = analysed(study)
    arms = {arm.name: arm for arm in analysis.arms}
    assert arms["lora_plus"].diverged == 1 and min(arms["lora_plus"].scores.values()) == 0.0
    assert set(arms["dora"].metrics) == set(STATED)
    for c in analysis.comparisons:  # the mean over items is the score, a diverged run's included
        assert c.bootstrap.estimate == c.difference.estimate
    text = table.markdown(analysis)
    assert "| arm | test exact match (%) |" in text and "test phoneme error rate" in text
    assert "count with the score of chance, 0.00 %." in " ".join(analysis.warnings)
    rate = analysed(dataclasses.replace(study, metric="phoneme_error_rate"))
    assert not rate.study.higher_is_better
    assert all(c.bootstrap is None for c in rate.comparisons)  # no mean of right and wrong
    for c, same in zip(rate.comparisons, analysis.comparisons, strict=True):
        if c.arm == "dora":
            assert c.difference.estimate == pytest.approx(-0.5 * same.difference.estimate)
    scores = {arm.name: arm for arm in rate.arms}["lora_plus"].scores
    assert max(scores.values()) == 1.0
    plain = analysed(dataclasses.replace(study, metric="perplexity"))
    assert "| minus lora |" in table.markdown(plain)
    assert "nats" not in " ".join(plain.conclusions) and "points" not in " ".join(plain.conclusions)


def test_learning_stands_beside_forgetting():
    study = language_study()
    analysis = analysed(study)
    for arm in analysis.arms:
        runs = [r for r in study.runs_of(arm.name, "compare") if r.complete]
        changes = [r.result["forgetting"]["kl_nats"] - 0.1 for r in runs]
        found = arm.forgetting
        assert found["loss_nats"].n == found["kl_nats"].n == len(runs)
        assert found["loss_nats"].estimate == pytest.approx(np.mean(changes))
        assert found["kl_nats"].estimate == pytest.approx(0.1 + np.mean(changes))
        half = np.std(changes, ddof=1) / len(runs) ** 0.5
        width = found["kl_nats"].high - found["kl_nats"].low
        assert 1.9 * 2 * half < width < 2.6 * 2 * half
    assert "## Learning and forgetting" in table.markdown(analysis)
    lost = [  # measured, and then the loss on test was not finite
        dataclasses.replace(run, result={**run.result, "forgetting": {
            "loss_nats_before": 3.0, "loss_nats_after": 9.0, "kl_nats": 9.0}})
        if run.diverged else run for run in study.runs
    ]  # fmt: skip
    assert any(run.diverged for run in lost)
    again = analysed(dataclasses.replace(study, runs=lost))
    assert [arm.forgetting for arm in again.arms] == [arm.forgetting for arm in analysis.arms]
    figures = plots.figures(analysis)
    assert {"forgetting_kl", "forgetting_loss"} < set(figures)
    html = page(analysis, figures)
    assert 'id="forgetting"' in html and html.count("KL from the base (nats)") >= 1
    assert "Exact match and phoneme error rate in %, loss in nats; brackets" in html
    plain = analysed(made_study(seeds=3))
    assert table.forgetting_table(plain).rows == []
    assert not [name for name in plots.figures(plain) if name.startswith("forgetting")]


def test_a_multirun_is_compared_by_the_primary_metric_of_its_task(tmp_path):
    study = language_study(tuning_seeds=0, failed=False)
    write_run_folders(study, tmp_path)
    for run in study.runs:  # only some answers were judged
        path = tmp_path / folder(run) / "predictions.jsonl"
        if path.is_file():
            more = '{"split": "test", "row": 999, "loss_nats": 1.0}\n'
            path.write_text(path.read_text() + more)
    found = load.load_study(tmp_path)
    assert found.metric == "exact_match"
    assert {run.correct for run in found.runs} == {run.correct for run in study.runs}
    assert load.load_study(tmp_path, metric="perplexity").metric == "perplexity"
    with pytest.raises(ValueError, match=r"no metric accuracy; there are exact_match, phoneme"):
        load.load_study(tmp_path, metric="accuracy")


@pytest.mark.parametrize(
    ("stated", "scores", "row", "message"),
    [
        ("exact_match", {"generated": 1}, {"correct": True, "loss_nats": 1.0}, None),
        ("exact_match", {"generated": 1}, {"loss_nats": 1.0}, "0 rows of test have correct, .* 1"),
        ("exact_match", {"generated": 1}, {"correct": True}, "line 1 .* it needs loss"),
        ("exact_match", {}, {"loss_nats": 1.0}, "line 1 .* it needs correct"),
        ("perplexity", {}, {"loss_nats": 1.0}, None),
        ("perplexity", {}, {"correct": True}, "line 1 .* it needs loss_nats"),
    ],
)
def test_a_prediction_has_what_its_metric_is_made_of(tmp_path, stated, scores, row, message):
    run = language_study(failed=False).runs[-1]
    split = {"exact_match": 1.0, "perplexity": 2.0, "n": 1, **scores}
    result = {**run.result, "metrics": {stated: STATED[stated]}}
    result |= {"test": split, "validation": split}
    run = dataclasses.replace(run, result=result, correct="1")
    study = dataclasses.replace(language_study(), runs=[run])
    write_run_folders(study, tmp_path)
    path = tmp_path / folder(run)
    (path / "predictions.jsonl").write_text(json.dumps({"split": "test", **row}) + "\n")
    if message is None:
        assert read_folder(path, "x", "compare").correct == ("1" if scores else None)
    else:
        with pytest.raises(ValueError, match=message):
            read_folder(path, "x", "compare")


def test_conclusions_know_which_way_is_better():
    study = language_study("phoneme_error_rate", diverged=False, failed=False)
    arms = {arm.name: arm for arm in analysed(study).arms}
    c = next(c for c in analysed(study).comparisons if c.arm == "dora")
    worse = dataclasses.replace(c, difference=dataclasses.replace(c.difference, estimate=0.05,
                                                                  low=0.04, high=0.06))  # fmt: skip
    (said,) = sentences.conclusions(study, list(arms.values()), [worse], [])
    assert "is worse than lora by 5.00 points" in said
