"""Advice: verdicts from the intervals of studies that nobody ran, starts with their sources."""

import dataclasses
import importlib.util
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from made_study import made_study, rekeyed
from scipy import stats

from harness.advise import __main__ as advise
from harness.advise.evidence import Evidence
from harness.compare.rows import row
from harness.compare.study import study_text
from harness.config import build
from harness.models import minilm

ROOT = Path(__file__).parent.parent
TINY = {"_target_": "harness.models.tiny.load", "_partial_": True, "architecture": "bert",
        "dtype": "float32"}  # fmt: skip
SEEDS = 6


def study_with(shifts, *, name="asked", metric="accuracy", **settings):
    """Of each arm's test score the reference's plus its shift, give or take 0.001 by seed."""
    arms = ("lora", *shifts)
    made = made_study(arms=arms, anchors=(), seeds=SEEDS, items=20, diverged=False, failed=False,
                      **{"tuning_seeds": 0, **settings})  # fmt: skip
    runs = []
    for run in made.runs:
        config = {**run.config, "model": TINY}
        result = run.result
        if run.phase == "compare":
            at = run.seed - 1000
            score = 0.5 + 0.02 * at + shifts.get(run.arm, 0.0)
            if run.arm != "lora":
                score += 0.001 * (-1) ** at
            result = {**result, "test": {**result["test"], metric: score}}
        runs.append(rekeyed(dataclasses.replace(run, result=result), config))
    return dataclasses.replace(made, name=name, metric=metric, runs=runs)


def write(study, folder: Path, rows=None) -> Path:
    folder.mkdir(parents=True)
    runs = study.runs if rows is None else study.runs[:rows]
    (folder / "runs.jsonl").write_text("".join(row(run) + "\n" for run in runs))
    (folder / "study.yaml").write_text(study_text(study))
    return folder.parent


def at_edge(study, *, all_but=""):
    """The study with the choices of all its arms but one at the edge of their grids."""
    chosen = {name: {**found, "bracketed": name == all_but} for name, found in study.chosen.items()}
    return dataclasses.replace(study, chosen=chosen)


def claim(expects, arm="dora", study="asked", against="lora"):
    return {"study": study, "arms": [arm], "against": against, "expects": expects}


# ---- verdicts -----------------------------------------------------------------------------------

WORDS = {  # what is expected -> the verdict where the arm is worse, not to be told apart, better
    "better": ("contradicted", "no difference seen", "supported"),
    "worse": ("supported", "no difference seen", "contradicted"),
    "not better": ("supported", "no difference seen", "contradicted"),
    "not worse": ("contradicted", "no difference seen", "supported"),
    "same": ("contradicted", "no difference seen", "contradicted"),
}


@pytest.mark.parametrize("metric", ["accuracy", "loss_nats"])
def test_the_interval_decides_a_claim(tmp_path, metric):
    for at, shift in enumerate((-0.02, 0.0, 0.02)):
        shift *= -1 if metric == "loss_nats" else 1  # a lower loss is better
        results = write(study_with({"dora": shift}, metric=metric), tmp_path / str(at) / "one")
        evidence = Evidence(results)
        for expects, words in WORDS.items():
            verdict = evidence.verdict([claim(expects)])
            assert verdict.word == words[at], (expects, shift)
            assert ("no difference larger than" in verdict.findings[0]) == (shift == 0)


def test_a_finding_has_interval_n_and_place(tmp_path):
    shifts = {"dora": 0.004, "qlora": 0.02}
    evidence = Evidence(write(study_with(shifts), tmp_path / "one"))
    values = [0.004 + 0.001 * (-1) ** at for at in range(SEEDS)]
    for family, against, said in ((2, "lora", ", all 2 comparisons at once"), (1, "qlora", "")):
        if against == "qlora":
            values = [0.004 - 0.02] * SEEDS  # their noise is one
        half = np.std(values, ddof=1) / SEEDS**0.5 * stats.t.ppf(1 - 0.025 / family, SEEDS - 1)
        mean = 100 * np.mean(values)
        found = evidence.verdict([claim("better", against=against)]).findings[0]
        if against == "lora":
            bounds = f"{mean:+.2f} [{mean - 100 * half:+.2f}, {mean + 100 * half:+.2f}]"
            assert (
                f"dora \N{MINUS SIGN} lora: {bounds} points accuracy, n = 6 paired seeds" in found
            )
            assert f"{said} (asked: all-MiniLM-L6-v2, movie_sentiment)" in found
        else:  # the same difference for every seed
            assert "nothing is concluded" in found


def test_against_another_reference_nothing_was_named_in_advance(tmp_path):
    """So it has its own interval, and not that of the study's family."""
    noise = {"dora": 0.002, "qlora": 0.0}
    study = study_with({"dora": 0.004, "qlora": 0.02})
    runs = []
    for run in study.runs:
        test = dict(run.result["test"])
        test["accuracy"] += noise.get(run.arm, 0.0) * (run.seed % 3)
        runs.append(dataclasses.replace(run, result={**run.result, "test": test}))
    results = write(dataclasses.replace(study, runs=runs), tmp_path / "one")
    values = [0.004 - 0.02 + 0.002 * ((1000 + at) % 3) for at in range(SEEDS)]
    (analysis,) = Evidence(results).analyses(against="qlora")
    found = {c.arm: c for c in analysis.comparisons}["dora"]
    low, high = stats.t.interval(0.95, SEEDS - 1, np.mean(values), stats.sem(values))
    assert (found.difference.low, found.difference.high) == pytest.approx((low, high))
    assert not found.primary and found.simultaneous is None and found.p is None
    (text,) = Evidence(results).verdict([claim("worse", against="qlora")]).findings
    assert f"[{100 * low:+.2f}, {100 * high:+.2f}]".replace("-", "\N{MINUS SIGN}") in text
    assert "at once" not in text


def test_several_findings(tmp_path):
    shifts = {"dora": 0.02, "qlora": -0.02, "adalora": 0.0}
    evidence = Evidence(write(study_with(shifts), tmp_path / "one"))
    both = {**claim("better"), "arms": ["dora", "qlora"]}
    assert evidence.verdict([both]).word == "mixed"
    three = evidence.verdict([{**claim("better"), "arms": [*shifts]}])
    assert (three.decided, three.tested) == (2, 3)
    assert evidence.verdict([claim("better"), claim("worse", "qlora")]).word == "supported"
    assert evidence.verdict([claim("better"), claim("better", "adalora")]).word == "supported"
    assert evidence.verdict([claim("better", "unknown")]).word == "untested"


def test_what_cannot_decide(tmp_path):
    write(study_with({"dora": 0.02}), tmp_path / "begun", rows=3)
    verdict = Evidence(tmp_path).verdict([claim("better")])
    assert (verdict.word, verdict.findings) == (
        "untested", ["asked has begun and is not finished"],
    )  # fmt: skip
    verdict = Evidence(tmp_path).verdict([claim("better", study="other")])
    assert verdict.findings == ["python train.py -m experiment=other would test it"]
    assert Evidence(tmp_path).verdict([]).word == "untested"
    assert not Evidence(tmp_path / "nowhere").found
    # at the edge of its grid
    study = study_with({"dora": 0.02}, tuning_seeds=2)
    for inside in ("lora", "dora"):  # the arm, and its reference
        results = write(at_edge(study, all_but=inside), tmp_path / inside / "one")
        verdict = Evidence(results).verdict([claim("better")])
        assert verdict.word == "untested" and "not bracketed" in verdict.findings[0]


def test_the_limits_of_a_case():
    case = advise.Case(variant="dora", model="causal", task="text", rows=50, words=9.0, hidden=8)
    assert case.meets({}) and case.meets({"rows_from": 50, "rows_below": 51, "model": "causal"})
    assert not case.meets({"rows_from": 51}) and not case.meets({"rows_below": 50})
    assert not case.meets({"rows_from": 1, "task": "generate"})


# ---- where to start -----------------------------------------------------------------------------


def advised(results, *arguments):
    """The lines; and the config of the last command."""
    text = advise.advice(["model=tiny", *arguments], results)
    command = next(line for line in text.splitlines() if line.startswith("python train.py"))
    return text, build.compose(shlex.split(command)[2:])


def joined(text):
    return " ".join(text.split())


def test_a_tuned_rate_comes_with_its_study_and_scale(tmp_path):
    study = study_with({"dora": 0.02}, tuning_seeds=2)
    runs = [
        dataclasses.replace(run, result={**run.result, "effective_scale": 3.0})
        for run in study.runs
    ]
    study = dataclasses.replace(study, runs=runs)
    assert study.chosen["dora"]["bracketed"]
    results = write(study, tmp_path / "results" / "one")
    text, config = advised(results, "variant=dora", "rank=4", "dropout=0.2")
    rate = study.chosen["dora"]["chosen"]["variant.lr"]
    assert config["variant"]["lr"] == pytest.approx(rate, rel=1e-5)
    assert config["rank"] == 4 and config["alpha"] == 12 and " dropout=0 " not in text
    scores = [run.score("accuracy") for run in study.runs_of("dora", "compare")]
    low, high = stats.t.interval(0.95, SEEDS - 1, np.mean(scores), stats.sem(scores))
    seen = f"{100 * np.mean(scores):.2f} [{100 * low:.2f}, {100 * high:.2f}] %, n = {SEEDS}"
    assert f"200 steps of 32 rows): test accuracy {seen}; within 1 %" in joined(text)
    assert "s = 3: the effective scale that this rate was chosen at" in text
    assert "at rank 8, so at another it is a guess" in joined(text)
    text, config = advised(results, "variant=dora")
    assert config["rank"] == 8 and "the rank that this rate was chosen at" in text
    assert "so at another it is a guess" not in joined(text)
    text, config = advised(results, "variant=dora", "variant.lr=1e-4")  # nobody chose it
    assert config["variant"]["lr"] == 1e-4 and "this rate was chosen at" not in text
    assert "as given; 0." in text and "tuned in asked" in joined(text)
    # another variant, and another base, have none
    assert "default of conf/variant/qlora.yaml" in advised(results, "variant=qlora")[0]
    text, config = advised(results, "model.architecture=llama", "variant=dora")
    assert config["variant"]["lr"] == 2e-4 and "authors' code for LLaMA-7B" in text


def test_a_rate_tuned_on_another_kind_of_task_is_not_advised(tmp_path):
    study = study_with({"dora": 0.02}, tuning_seeds=2)
    evidence = Evidence(write(study, tmp_path / "results" / "one"))
    given = {"variant": "dora", "model": "encoder", "rows": 99, "words": 5.0, "hidden": 32}
    found = {
        kind: advise._tuned_rate(advise.Case(**given, task=kind), study.runs[0].config, evidence)
        for kind in ("classify", "generate", "text")
    }
    assert found["classify"] and not found["generate"] and not found["text"]


def test_a_rate_at_the_edge_of_its_grid_is_not_advised(tmp_path):
    study = study_with({"dora": 0.02}, tuning_seeds=2)
    rate = study.chosen["dora"]["chosen"]["variant.lr"]
    results = write(at_edge(study, all_but="lora"), tmp_path / "results" / "one")
    text, config = advised(results, "variant=dora")
    assert config["variant"]["lr"] != pytest.approx(rate, rel=1e-5) and "tuned in" not in text
    assert "tuned in asked" in joined(advised(results, "variant=lora")[0])


@pytest.mark.parametrize("metric", ["accuracy", "loss_nats"])
@pytest.mark.parametrize("arms", ["qlora dora adalora", "adalora dora qlora"])
def test_of_several_better_arms_the_best_is_advised(tmp_path, metric, arms):
    """qlora's, whose rank is 4, in whatever order they stand."""
    sign = -1 if metric == "loss_nats" else 1
    shifts = {"qlora": 0.03, "dora": 0.01, "adalora": 0.02}
    study = study_with(
        {arm: sign * shifts[arm] for arm in arms.split()}, name="rank", metric=metric
    )
    rename = {"lora": "r8", "qlora": "r4", "dora": "r2", "adalora": "r3"}
    runs = [dataclasses.replace(run, arm=rename[run.arm]) for run in study.runs]
    expected = [{**row, "arm": rename[row["arm"]]} for row in study.expected]
    names = [rename[arm] for arm in ("lora", *arms.split())]
    study = dataclasses.replace(
        study, runs=[], expected=expected, reference="r8", primary=names[1:],
        arms={name: [f"rank={name[1:]}", "alpha=16"] for name in names},
    )  # fmt: skip
    free = {"free": ["rank", "alpha"]}
    runs = [
        dataclasses.replace(rekeyed(run, {**run.config, **free, "rank": int(run.arm[1:])}))
        for run in runs
    ]
    results = write(dataclasses.replace(study, runs=runs), tmp_path / "results" / "one")
    assert advised(results)[1]["rank"] == 4


def test_a_study_of_ranks_chooses_the_rank(tmp_path):
    for best, name in (("r8", "flat"), ("r64", "steep")):
        study = study_with({"dora": 0.02 if best == "r64" else 0.0}, name="rank")
        rename, ranks = {"lora": "r8", "dora": "r64"}, {"lora": (8, 16), "dora": (64, 128)}
        runs = []
        for run in study.runs:
            rank, alpha = ranks[run.arm]
            config = {**run.config, "rank": rank, "alpha": alpha, "free": ["rank", "alpha"]}
            runs.append(dataclasses.replace(rekeyed(run, config), arm=rename[run.arm]))
        expected = [{**row, "arm": rename[row["arm"]]} for row in study.expected]
        study = dataclasses.replace(
            study, runs=runs, expected=expected, reference="r8", primary=["r64"],
            arms={"r8": ["rank=8", "alpha=16"], "r64": ["rank=64", "alpha=128"]},
        )  # fmt: skip
        results = write(study, tmp_path / name / "one")
        text, config = advised(results)
        if best == "r8":
            assert config["rank"] == 8 and "no arm of rank was seen to be better than r8" in text
        else:  # of a hidden size of 36
            assert config["rank"] == 16 and "; halved to fit a hidden size of 36" in joined(text)
            assert "contradicted rank 4 to 8 is enough to classify" in joined(text)
            assert "supported a bigger rank is better" in joined(text)


def test_without_results_there_are_papers(tmp_path):
    text, config = advised(tmp_path / "results")
    assert "there is no results/ here" in text and "arXiv:2106.09685" in text
    assert config["variant"]["lr"] == 5e-4 and (config["rank"], config["alpha"]) == (8, 16)
    assert "tiny: encoder, hidden size 36, 2 layers, 40.4k parameters" in text
    assert "8,142 training rows, 19 words a row" in text
    verdicts = {line.split()[0] for line in text.splitlines() if line.startswith("  u")}
    assert verdicts == {"untested"}
    assert max(map(len, text.splitlines())) <= 120


def test_a_variant_without_factors_has_a_rate_alone(tmp_path):
    text, config = advised(tmp_path, "variant=full")
    assert "rank" not in text.partition("start with")[2].partition("what is")[0]
    assert config["variant"]["lr"] == 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=tinny"], "there is no model=tinny; there are .* Did you mean tiny?"),
        (["-m"], "'-m' is not an override; write key=value"),
        (
            ["model=tiny", "variant=lora,dora"],
            "variant=lora,dora gives several values; give one of them",
        ),
        (["model=tiny", "rank=abc"], "rank is 'abc'"),
        (["model=tiny", "task=local"], "task.files.train"),
        (["model=tiny", "targets=[nothing]"], "target 'nothing' matches no layer"),
        (["model=hf"], "model=hf needs model.name"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["advise", *arguments])
    monkeypatch.setattr(advise, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=f"error: .*{message}") as ended:
        advise.main()
    assert "\n" not in str(ended.value)


# ---- the rules, and the studies that are here ---------------------------------------------------


def test_rules_name_experiments_arms_and_sources():
    for entries in advise.RULES["starts"].values():
        assert all("study" in e or {"value", "source", "status"} <= set(e) for e in entries)
    for key in ("rank", "scale", "dropout", "targets"):  # something is always said
        assert "when" not in advise.RULES["starts"][key][-1]
    for rule in advise.RULES["claims"]:
        assert rule["claim"] and rule["source"]
        for test in rule["tests"]:
            path = ROOT / "conf/experiment" / f"{test['study']}.yaml"
            arms = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["arms"]
            assert {*test["arms"], test["against"]} <= set(arms), test


def test_the_studies_here_speak_for_themselves():
    folder = next(ROOT.glob("results/*_fixed_rate_trap"), None)
    if folder is None or importlib.util.find_spec(minilm.PACKAGE) is None:
        pytest.skip("needs results/ and the extra `embedded`")
    text = joined(advise.advice(["task=movie_sentiment"], ROOT / "results"))
    scores = {}
    for line in (folder / "runs.jsonl").read_text().splitlines():
        run = json.loads(line)
        scores[run["arm"], run["seed"]] = run["result"]["test"]["accuracy"]
    pair = [100 * (scores["lora_at_full", s] - scores["lora", s]) for s in range(8)]
    low, high = stats.t.interval(0.95, 7, np.mean(pair), stats.sem(pair))
    assert high < 0 and "contradicted one rate for all variants is a fair comparison" in text
    seen = f"{np.mean(pair):.2f} [{low:.2f}, {high:.2f}]".replace("-", "\N{MINUS SIGN}")
    assert f"lora_at_full \N{MINUS SIGN} lora: {seen} points" in text
    assert "tuned in variants_movie (all-MiniLM-L6-v2, movie_sentiment, 100 steps" in text
