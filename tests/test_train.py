"""The loop: what a run leaves, that it is the same twice, that interruptions change nothing."""

import copy
import json
import os
import re
import shutil
import signal
from functools import partial, wraps
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adapters import config_of
from command import CommandLine
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import harness.loop.step
import variants
from harness.config import build, identity
from harness.config.build import CONF
from harness.disk import digest
from harness.loop import checkpoint, laws, meter, rate_test, schedule
from harness.loop.folder import RunFolder
from harness.loop.laws import MERGE_TOLERANCE
from harness.loop.step import StepResult
from harness.models import tiny
from harness.study.index import RunIndex
from harness.tasks import classification, language, turns

VARIANTS = sorted(path.stem for path in (CONF / "variant").glob("*.yaml"))
CHANGING = ["lora", "adalora", "adalora_budget", "dora"]  # one of each kind of state
ADALORA = [
    "variant.allocator.interval=1",
    "variant.allocator.epsilon=0.2",
    "variant.allocator.patience=1",
]


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> CommandLine:
    return CommandLine(tmp_path, monkeypatch, capsys)


def options(variant: str) -> list[str]:
    """Overrides that make the ranks of a run of 8 steps change, if the variant has any."""
    return [
        f"variant={variant}",
        *(ADALORA if variant.endswith("adalora") else ["variant.lr=0.01"]),
    ]


def comparable(folder) -> dict:
    """All that two identical runs must agree on."""
    result = json.loads((folder / "result.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "result": {k: v for k, v in result.items() if k not in ("time", "memory")},
        "metrics": [{k: v for k, v in row.items() if not k.startswith("time/")} for row in metrics],
        "predictions": (folder / "predictions.jsonl").read_text(),
    }


def same_adapter(one, other) -> None:
    a, b = (load_file(folder / "adapter/native.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_shares_of_the_time(monkeypatch):
    now = [0.0]

    def passing(seconds, result=None):
        now[0] += seconds
        return result

    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    gauge = meter.Meter(
        torch.nn.Linear(1, 1), torch.optim.SGD([torch.ones(1)]), torch.device("cpu")
    )
    for step in range(1, meter.WARMUP_STEPS + 4):
        one = StepResult(0.1, 0.0, 1.0, 7 + step, (4, 5), {}, model_s=6.0, optimizer_s=3.0)
        took = 22.0 if step == meter.WARMUP_STEPS + 3 else 10.0
        gauge.step(step, lambda number, one=one, took=took: passing(took, one))
        passing(0.25)  # the log
        with gauge.pause():
            passing(100.0)
    # Three steps are timed; of each 9 seconds are the model's or the optimiser's, and a log is
    # before it.
    assert gauge.times()["train_s"] == 42 and gauge.times()["eval_s"] == 600
    assert gauge.times()["step_median_s"] == 10 and gauge.times()["timed_steps"] == 3
    assert gauge.times()["tokens_per_s"] == (11 + 12 + 13) / 42
    other = meter.Meter(gauge.model, gauge.optimizer, gauge.device)
    other.load_state_dict(gauge.state_dict())  # as a resumed run does
    assert other.times() == gauge.times()
    assert gauge.times()["optimizer_frac"] == 9 / 42
    assert gauge.times()["outside_frac"] == (1 + 1 + 13 + 3 * 0.25) / 42
    gauge.device = torch.device("cuda")  # it works while these run
    assert gauge.times()["outside_frac"] is None


def test_the_peak_is_that_of_the_largest_batch(monkeypatch):
    gauge = meter.Meter(
        torch.nn.Linear(1, 1), torch.optim.SGD([torch.ones(1)]), torch.device("cpu")
    )
    monkeypatch.setattr(meter, "PROFILED_STEP", 4)
    shapes = [(2, 3), (4, 5), (1, 6), (5, 2), (9, 9)]
    noted = []
    for number, shape in enumerate(shapes, start=1):
        gauge.step(number, lambda _, s=shape: StepResult(0.1, 0.0, 1.0, 1, s, {}, 0.0, 0.0))
        noted.append(gauge.peak_shape)
    # From the profiled step on, it is that step's.
    assert noted == [(2, 3), (4, 5), (4, 5), (5, 2), (5, 2)]


def test_the_peak_is_of_weights_moments_and_what_a_step_makes():
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.Adam(model.parameters())
    gauge = meter.Meter(model, optimizer, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def take_step(number):
        optimizer.step()
        for _ in range(2):  # one after the other
            torch.empty(1_000_000)
        return StepResult(0.1, 0.0, 1.0, 1, (1, 1), {}, 0.0, 0.0)

    for step in (1, 2):
        gauge.step(step, take_step)
    numbers = 100 * 100 + 100
    expected = 4 * (3 * numbers + 2 + 1_000_000)  # with Adam's two counts of steps
    assert gauge.memory()["train_peak_bytes"] == expected


def test_a_run_leaves_what_the_readme_lists(cli):
    assert cli("variant=dora") == 0, cli.err
    (folder,) = cli.folders()
    assert folder.parent.name == "default" and folder.name.startswith("dora-s0-")
    left = sorted(path.name for path in folder.iterdir())
    assert left == sorted(
        ["adapter", "config.yaml", "environment.json", "metrics.jsonl", "predictions.jsonl",
         "result.json", "run.json", "samples.jsonl"]
    )  # fmt: skip
    result = cli.result()
    assert result["status"] == "complete" and result["steps"] == 8
    assert result["effective_scale"] == 2.0
    assert result["test"]["n"] == 14 and result["validation"]["n"] == 12
    assert {"accuracy", "macro_f1", "loss_nats"} <= result["test"].keys()
    assert result["base_fingerprint"]["before"] == result["base_fingerprint"]["after"]
    assert set(result["active_rank"].values()) == {8}
    assert result["merged_max_abs_diff"] < 1e-5
    assert result["memory"]["train_peak_bytes"] > result["memory"]["base_bytes"] > 0
    assert result["time"]["step_median_s"] > 0
    assert 0 < result["time"]["optimizer_frac"] < 1 and result["time"]["outside_frac"] > 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert "eval/accuracy" in rows[1] and "eval/accuracy" not in rows[0]
    assert any(key.startswith("norm/relative/") for key in rows[0])
    assert rows[-1]["eval/loss_nats"] == result["validation"]["loss_nats"]
    predictions = (folder / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 26


@pytest.mark.parametrize("variant", CHANGING)
def test_an_interrupted_run_continues_bit_for_bit(cli, variant, monkeypatch):
    """Before its first checkpoint, after which it is the same command twice, and between two."""
    whole = cli.root / "whole"
    common = [*options(variant), "dropout=0.1", "train.accumulation=2"]
    assert cli(*common, f"run_dir={whole}") == 0, cli.err
    for killed_at in (1, 7):
        parts = cli.root / f"parts {killed_at}"
        with monkeypatch.context() as patch:
            patch.setattr(harness.loop.step, "training_step", ended_after(killed_at))
            with pytest.raises(KeyboardInterrupt):
                cli(*common, f"run_dir={parts}")
        assert not (parts / "result.json").exists()
        assert cli(*common, f"run_dir={parts}") == 0, cli.err
        assert ("continuing" in cli.out) == (killed_at > 1)
        assert comparable(whole) == comparable(parts)
        same_adapter(whole, parts)


def test_a_finished_run_is_shown_not_repeated(cli):
    assert cli("variant=lora") == 0
    before = cli.result()
    assert cli("variant=lora") == 0
    assert "complete already" in cli.out and cli.result() == before
    assert cli("variant=lora", "force=true") == 0
    assert "complete already" not in cli.out
    assert cli.result()["time"] != before["time"]


def test_a_folder_of_another_run_is_refused(cli):
    run_dir = f"run_dir={cli.root / 'mine'}"
    assert cli("variant=lora", run_dir) == 0
    assert cli("variant=dora", run_dir) == 1
    assert "holds a run with other settings" in cli.err
    assert cli("variant=dora", f"run_dir={cli.root / 'data'}", "force=true") == 1
    assert "is not a run's folder" in cli.err and (cli.root / "data/train.csv").exists()
    marker = cli.root / "mine/run.json"
    marker.write_text(json.dumps({k: v for k, v in json.loads(marker.read_text()).items()
                                  if k != "fingerprints"}))  # fmt: skip
    assert cli("variant=lora", run_dir) == 1
    assert "another version of this project" in cli.err
    for damaged in ("{", "null", '{"config": 3}', "[1]"):
        marker.write_text(damaged)
        assert cli("variant=lora", run_dir) == 1
        assert "run.json" in cli.err and "Traceback" not in cli.err


def test_a_folder_of_somebody_else_is_left_alone(cli):
    """Of hidden files too, and of what a link leads to."""
    work, other = cli.root / "work", cli.root / "other"
    (work / ".git").mkdir(parents=True)
    (work / ".env").write_text("mine")
    for force in ("false", "true"):
        assert cli("variant=lora", f"run_dir={work}", f"force={force}") == 1
        assert "is not a run's folder" in cli.err and (work / ".env").read_text() == "mine"
    (begun := cli.root / "begun").mkdir()
    (begun / ".run.json.123").write_text("{")  # a run killed while it wrote its first file
    assert cli("variant=lora", f"run_dir={begun}") == 0, cli.err
    other.mkdir()
    (other / "kept").write_text("mine")
    (begun / "link").symlink_to(other)
    assert cli("variant=lora", f"run_dir={begun}", "force=true") == 0, cli.err
    assert (other / "kept").read_text() == "mine" and not (begun / "link").exists()


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    RunFolder(tmp_path / "run", "key", {}).create({})
    names = [f".{name}.123" for name in ("environment.json", "metrics.jsonl", "config.yaml")]
    for name in names:
        (tmp_path / "run" / name).write_text("{")
    (tmp_path / "run" / ".mine").write_text("")
    RunFolder(tmp_path / "run", "key", {}).create({})
    assert [path.name for path in tmp_path.rglob(".*")] == [".mine"]


def test_a_damaged_result_is_one_sentence(cli):
    assert cli("variant=lora", "train.steps=2") == 0
    file = cli.folders()[0] / "result.json"
    about = json.loads(file.with_name("run.json").read_text())
    for damaged in ("", "{}", "[]", "null", "{", '{"status": "complete"}'):
        file.write_text(damaged)
        with pytest.raises(ValueError, match="force=true replaces it") as error:
            RunFolder(file.parent, about["run_key"], about["fingerprints"]).result()
        assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
    assert cli("variant=lora", "train.steps=2") == 1
    assert cli.err.count("\n") == 1 and f"error: {file}" in cli.err
    assert "force=true replaces it" in cli.err and file.read_text() == damaged
    assert cli("-m", "variant=lora", "seed=0,1", "train.steps=2") == 1  # the other one is run
    assert [json.loads(f.read_text())["seed"] for f in cli.root.rglob("lora-s1-*/result.json")]
    assert cli("variant=lora", "train.steps=2", "force=true") == 0, cli.err


def test_a_damaged_line_of_metrics_is_one_sentence(tmp_path):
    folder = RunFolder(tmp_path / "run", "key", {})
    folder.create({})
    file = folder.path / "metrics.jsonl"
    rows = [{"step": step, "train/loss_nats": 0.5} for step in (2, 4, 6)]
    good = [json.dumps(row) + "\n" for row in rows]
    for damaged in ("3\n", "{\n", '{"step": "x"}\n', "null\n", "\n"):
        file.write_text(good[0] + damaged + good[2])
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged; force=true"):
            folder.history(up_to=6)
        file.write_text(good[0] + good[1] + damaged)
        assert folder.history(up_to=6) == rows[:2]
        assert file.read_text() == good[0] + good[1]


def test_variants_share_the_control_hash_and_other_settings_do_not(cli):
    hashes = {}
    for name, overrides in {
        "lora": ["variant=lora"],
        "dora": ["variant=dora", "seed=1"],
        "rank": ["variant=lora", "rank=4"],
        "rows": ["variant=lora"],
    }.items():
        if name == "rows":
            with open(cli.root / "data/test.csv", "a") as file:
                file.write("a new row,good\n")
        assert cli(*overrides, "train.steps=2", f"run_dir={cli.root / name}") == 0, cli.err
        hashes[name] = cli.result(cli.root / name)["control_hash"]
    assert hashes["lora"] == hashes["dora"]
    assert len({hashes["rank"], hashes["rows"], hashes["lora"]}) == 3


# Keys that leave a run the same run, and why.
NO_OTHER_RUN = {
    "tracking": "who is told", "outputs_dir": "a place", "run_dir": "a place",
    "force": "whether to begin anew", "dry_run": "keeps no run", "rate_test": "keeps no run",
    "free": "what a comparison is about", "strategy": "the same run but for rounding",
    "train.log_every": "what is written", "train.checkpoint_every": "what is written",
    "train.keep_checkpoints": "what is written", "partial": "whether a run is refused",
    "train.resume": "whether a run is continued, which its result says",
}  # fmt: skip
# Keys that make another run, which may stand beside the first, and why.
NO_OTHER_COMPARISON = {
    "variant": "what is compared", "seed": "over which is averaged",
    "task.files": "a place; the data have a fingerprint",
    "model.name": "a place; the base has a fingerprint",
    "model.revision": "a place; the base has a fingerprint",
    "init_from": "a place; what it holds has a fingerprint",
    "train.evaluate_test": "looked at when training has ended",
}  # fmt: skip


def leaves_of(node, path=()):
    """(path, value) of all that is no mapping, and of empty ones."""
    if isinstance(node, dict) and node:
        for key, child in node.items():
            yield from leaves_of(child, (*path, key))
    else:
        yield path, node


def another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return {"x": 1} if isinstance(value, dict) else ["x"] if value != ["x"] else []


def test_every_key_makes_another_run_and_comparison_or_it_is_said_why_not():
    def stands(key, listed):
        return any(key == name or key.startswith(f"{name}.") for name in listed)

    prints = {"data": "1", "base": "2", "tokenizer": "3"}
    seen = set()
    for overrides in (
        [],
        ["variant=adalora", "task=local_sft", "model=hf", "schedule=cosine", "tracking=wandb",
         "model.name=m", "task.files.train=a", "task.files.test=b"],
        ["variant=adalora_budget", "task=hub", "optimizer=sgd", "schedule=constant"],
    ):  # fmt: skip
        config = config_of(*overrides)
        run, comparison = identity.run_key(config), identity.control_hash(config, prints)
        for path, value in leaves_of(config):
            key = ".".join(path)
            seen.add(key)
            changed = copy.deepcopy(config)
            node = changed
            for part in path[:-1]:
                node = node[part]
            node[path[-1]] = another(value)
            same = stands(key, NO_OTHER_RUN)
            assert (identity.run_key(changed) == run) == same, key
            same = same or stands(key, NO_OTHER_COMPARISON)
            assert (identity.control_hash(changed, prints) == comparison) == same, key
    for name in {**NO_OTHER_RUN, **NO_OTHER_COMPARISON}:
        assert any(stands(key, [name]) for key in seen), name
    for name in prints:
        assert identity.control_hash(config, {**prints, name: "x"}) != comparison


def test_what_an_experiment_frees_makes_another_run_in_the_same_comparison():
    one, other = (config_of("free=[rank]", f"rank={rank}") for rank in (4, 8))
    assert identity.run_key(one) != identity.run_key(other)
    assert identity.control_hash(one, {}) == identity.control_hash(other, {})


@pytest.mark.parametrize("task", ["local", "local_sft", "arithmetic"])
def test_a_key_that_came_later_leaves_older_runs_their_keys(task):
    config = config_of(f"task={task}")
    later = ["init_from", "train.on_nonfinite", "model.sizes", "task.date", "task.control_tokens",
             "model.revision", "model.attention", "model.new_tokens",
             "schedule.warmup_steps", "groups.module_factors",
             "variant.groups.module_factors"]  # fmt: skip
    assert set(later) == set(identity._YOUNGER)
    older = identity.without(config, later)
    assert identity.run_key(older) == identity.run_key(config)
    assert identity.control_hash(older, {}) == identity.control_hash(config, {})


def test_a_run_whose_accumulation_meant_another_thing_is_another_run(tmp_path):
    """It was a mean of microsteps' means; with one microstep a step nothing has changed."""
    for microsteps in (1, 2):
        config = config_of(f"train.accumulation={microsteps}")
        key = digest.digest(identity.irrelevant_removed(config))
        assert (identity.run_key(config) == key) == (microsteps == 1)
        for name, made_as in (("then", key), ("now", identity.run_key(config))):
            folder = RunFolder(tmp_path / f"{microsteps} {name}", made_as, {})
            folder.create({**config, "run_dir": str(folder.path)})
            found = RunIndex(tmp_path).find({**config, "run_dir": str(folder.path)})
            assert (found is None) == (microsteps == 2 and name == "then")


@pytest.mark.parametrize(
    ("task", "same"),
    [(["task=local"], True), (["task=local_text"], True), (["task=local_sft"], False),
     (["task=local_sft", "task.chat=true"], False), (["task=local_sft", "task.chat=false"], True)],
)  # fmt: skip
def test_a_run_whose_turns_were_tokenised_one_by_one_is_another_run(task, same):
    """Those of a chat template, which a tokenizer may have if nothing is said."""
    config = config_of(*task)
    assert (identity.run_key(config) == digest.digest(identity.irrelevant_removed(config))) == same


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_and_evaluations_leave_training_as_it_was(cli, variant):
    """Those that no allocator sees: growth goes by the scheduled ones of a signal slice."""
    own = ["variant.allocator.interval=1"] if variant.endswith("adalora") else []
    if "dropout" in config_of(f"variant={variant}")["variant"]["adapter"]:
        own.append("dropout=0.2")
    for every in (1, 8):
        run = [f"train.eval_every={every}", f"run_dir={cli.root / str(every)}"]
        assert cli(f"variant={variant}", "task.signal_rows=0", *own, *run) == 0, cli.err
    same_adapter(cli.root / "1", cli.root / "8")
    result = cli.result(cli.root / "8")
    assert (result["status"], result["variant"]) == ("complete", variant)
    before, after = result["base_fingerprint"].values()
    assert before == after
    assert result["parameters"]["trainable_final"] <= result["parameters"]["trainable"]


def test_numbers_and_places_do_not_make_another_run(cli):
    assert cli("variant=lora", "alpha=16") == 0
    assert cli("variant=lora", "alpha=16.0") == 0
    assert "complete already" in cli.out
    before = cli.result()["control_hash"]
    moved = cli.root / "moved.csv"
    moved.write_bytes((cli.root / "data/test.csv").read_bytes())
    run_dir = cli.root / "moved"
    assert cli("variant=lora", f"task.files.test={moved}", f"run_dir={run_dir}") == 0
    assert cli.result(run_dir)["control_hash"] == before


def test_a_run_starts_where_another_ended(cli):
    first, second = cli.root / "first", cli.root / "second"
    assert cli("variant=lora", f"run_dir={first}") == 0, cli.err
    on = [f"init_from={first}", "variant.lr=1e-9", "groups.module_rates={head: 1e-9}"]
    assert cli("variant=lora", *on, f"run_dir={second}") == 0, cli.err
    assert "Starts from" in cli.out and "with all that it had trained" in cli.out
    before, after = cli.result(first), cli.result(second)
    assert after["validation"]["loss_nats"] == pytest.approx(before["validation"]["loss_nats"])
    assert after["fingerprints"]["init_from"] and "init_from" not in before["fingerprints"]
    assert after["control_hash"] != before["control_hash"]
    assert cli("variant=dora", *on, f"run_dir={cli.root / 'third'}") == 0, cli.err
    third = cli.result(cli.root / "third")
    assert "s is 2 there and 2 here" in cli.out
    assert third["validation"]["loss_nats"] == pytest.approx(before["validation"]["loss_nats"])
    assert third["control_hash"] == after["control_hash"]
    assert cli("variant=lora", f"init_from={cli.root / 'nowhere'}") == 1
    assert "is no folder; give a run's folder or an adapter's" in cli.err
    assert cli("variant=lora", f"init_from={first}", "rank=2") == 1
    assert "has room for rank 2; the adapter's is 8" in cli.err
    shutil.rmtree(first / "adapter")
    assert cli("variant=lora", *on, f"run_dir={second}") == 1
    assert "the run in it is not finished, or failed" in cli.err


def test_a_language_model_is_trained_and_what_it_forgot_is_measured(cli):
    for name, count in (("train", 60), ("validation", 7), ("test", 5)):
        pairs = [{"prompt": f"{n} and one is", "completion": f" {n + 1}"} for n in range(count)]
        text = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (cli.root / f"{name}.jsonl").write_text(text)
    files = [f"task.files.{n}={cli.root / n}.jsonl" for n in ("train", "validation", "test")]
    task = ["task=local_sft", "model=tiny_llama", "task.generate_rows=3", "task.max_new_tokens=2"]
    task += files
    cli.defaults = [d for d in cli.defaults if not d.startswith(("task", "model"))]
    assert cli(*task, "variant=lora", f"run_dir={cli.root / 'lm'}") == 0, cli.err
    result = cli.result(cli.root / "lm")
    assert result["primary_metric"] == "exact_match" and result["classes"] is None
    assert {"loss_nats", "perplexity", "exact_match", "generated"} < set(result["test"])
    assert result["forgetting"]["kl_nats"] > 0 and result["forgetting"]["tokens"] == 512
    assert list(result["metrics"]) == ["exact_match", "loss_nats", "perplexity"]
    assert result["metrics"]["perplexity"] == {
        "higher_is_better": False, "chance": 259.0, "per_item": False,
    }  # fmt: skip
    none = dict.fromkeys(("train", "signal", "validation", "test"), 0)
    used = {"train": 57, "signal": 3, "validation": 7, "test": 5}
    assert result["rows"] == {"used": used, "cut": none, "lost": none}
    assert result["generation"]["do_sample"] is False
    lines = (cli.root / "lm/samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 3 and {"prompt", "generated", "expected"} < set(samples[0])
    assert samples[0]["prompt"].startswith("<s>") and "and one is" in samples[0]["prompt"]
    assert "perplexity" in cli.out and "tokens are learned" not in cli.out
    about = json.loads((cli.root / "lm/adapter/adapter_config.json").read_text())
    assert about["task_type"] == "CAUSAL_LM" and about["modules_to_save"] is None
    assert cli(*task, "variant=lora", "model=tiny") == 1
    assert "is an encoder, which cannot generate text" in cli.err
    assert cli(*task, "variant=dora", "dry_run=true") == 0, cli.err
    assert "tokens are learned, those in brackets" in cli.out


def test_a_dry_run_leaves_nothing(cli):
    before = sorted(cli.root.rglob("*"))
    assert cli("variant=dora", "dry_run=true") == 0, cli.err
    assert re.search(r"about \d+ s for 8 steps", cli.out) and "[CLS]" in cli.out
    assert sorted(cli.root.rglob("*")) == before


def test_a_diverged_run_says_so_and_keeps_its_last_good_state(cli, monkeypatch):
    real = harness.loop.step.training_step

    def poisoned(step, *, loss, **arguments):
        def task_loss(model, batch):
            return loss(model, batch) * (float("nan") if step == 5 else 1.0)

        return real(step, loss=task_loss, **arguments)

    run_dir = cli.root / "diverged"
    command = ["variant=lora", "train.checkpoint_every=100", f"run_dir={run_dir}"]
    with monkeypatch.context() as patch:
        patch.setattr(harness.loop.step, "training_step", poisoned)
        assert cli(*command) == 1
    assert "training diverged at step 5" in cli.err and "largest parameter norms" in cli.err
    result = cli.result(run_dir)
    assert result["status"] == "failed" and "diverged" in result["reason"]
    assert result["parameters"]["trainable"] > 0 and result["control_hash"]
    (kept,) = (run_dir / "checkpoints").iterdir()
    assert kept.name == "step-00000004"
    state = load_file(kept / "tensors.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert cli(*command) == 1, "a failed run is shown again, as failed"
    assert "training diverged at step 5" in cli.err and kept.exists()


def ended_after(step: int):
    """A training step that is killed after this one."""
    real = harness.loop.step.training_step

    def interrupted(number, **arguments):
        if number > step:
            raise KeyboardInterrupt
        return real(number, **arguments)

    return interrupted


def without_gradient_at(patch, steps) -> None:
    """The loss of these steps is NaN."""
    real = harness.loop.step.training_step

    def poisoned(step, *, loss, **arguments):
        def task_loss(model, batch):
            return loss(model, batch) * (float("nan") if step in steps else 1.0)

        return real(step, loss=task_loss, **arguments)

    patch.setattr(harness.loop.step, "training_step", poisoned)


def test_a_step_without_a_gradient_may_be_skipped_and_is_counted(cli, monkeypatch):
    run = ["variant=adalora", *ADALORA, "train.on_nonfinite=skip"]
    with monkeypatch.context() as patch:
        without_gradient_at(patch, (3, 4, 8))
        assert cli(*run, f"run_dir={cli.root / 'some'}", "train.log_every=1") == 0, cli.err
    result = cli.result(cli.root / "some")
    assert result["status"] == "complete" and result["skipped_steps"] == 3
    rows = map(json.loads, (cli.root / "some/metrics.jsonl").read_text().splitlines())
    counts = {row["step"]: row.get("train/skipped_steps") for row in rows}
    assert counts == {1: None, 2: None, 3: 1, 4: 2, 5: None, 6: None, 7: None, 8: 3}

    parts = f"run_dir={cli.root / 'parts'}"
    with monkeypatch.context() as patch:
        patch.setattr(harness.loop.step, "training_step", ended_after(5))
        without_gradient_at(patch, (3, 4))
        with pytest.raises(KeyboardInterrupt):
            cli(*run, parts)
    without_gradient_at(monkeypatch, (8,))
    assert cli(*run, parts) == 0, cli.err
    assert cli.result(cli.root / "parts")["skipped_steps"] == 3  # those before the end, too


def test_a_skipped_step_changes_nothing(cli, monkeypatch):
    """Steps 1 to 5 are lost: B is still 0, and no moment has seen a NaN."""
    with monkeypatch.context() as patch:
        without_gradient_at(patch, range(1, 6))
        run = ["variant=lora", "train.on_nonfinite=skip", "train.steps=5"]
        assert cli(*run, "train.keep_checkpoints=null") == 0, cli.err
    (folder,) = cli.folders()
    assert not (folder / "checkpoints/step-00000005").exists()
    state = load_file(folder / "checkpoints/step-00000004/tensors.safetensors")
    moved = {name for name in state if name.endswith(".B") and state[name].any()}
    assert not moved and not [name for name in state if name.startswith("optimizer/")]


def test_ten_lost_steps_in_a_row_are_the_end(cli, monkeypatch):
    without_gradient_at(monkeypatch, range(3, 40))
    assert cli("variant=lora", "train.on_nonfinite=skip", "train.steps=40") == 1
    assert "diverged at step 12" in cli.err and cli.result()["status"] == "failed"
    assert cli("variant=lora", "train.on_nonfinite=sometimes") == 1
    assert "train.on_nonfinite is 'sometimes'; it must be stop or skip." in cli.err


def test_a_signal_ends_a_run_after_its_step_and_loses_nothing(cli, monkeypatch, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    run = ["variant=lora", "variant.lr=0.01", "train.checkpoint_every=100"]
    assert cli(*run, f"run_dir={cli.root / 'whole'}") == 0, cli.err
    real, times = harness.loop.step.training_step, 1

    def signalled(step, **arguments):
        for _ in range(times if step == 3 else 0):
            os.kill(os.getpid(), getattr(signal, name))
        return real(step, **arguments)

    for name in ("SIGTERM", "SIGINT"):
        parts = cli.root / name
        with monkeypatch.context() as patch:
            patch.setattr(harness.loop.step, "training_step", signalled)
            assert cli(*run, f"run_dir={parts}") == 128 + getattr(signal, name)
            assert f"{name}: ending after this step; once more ends it at once." in cli.err
            assert f"ended by {name} after step 3; the same command goes on from it" in cli.out
        assert cli(*run, f"run_dir={parts}") == 0, cli.err
        assert "continuing" in cli.out and "after step 3" in cli.out
        assert comparable(cli.root / "whole") == comparable(parts)
        same_adapter(cli.root / "whole", parts)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    times = 2
    monkeypatch.setattr(harness.loop.step, "training_step", signalled)
    with pytest.raises(KeyboardInterrupt):
        cli(*run, f"run_dir={cli.root / 'twice'}")


def test_what_cannot_be_written_is_one_sentence(cli):
    """A name that is taken by the wrong kind."""
    assert cli("variant=lora", "train.steps=2", f"run_dir={cli.root / 'good'}") == 0, cli.err
    for name in ("metrics.jsonl", "config.yaml", "checkpoints", "result.json"):
        folder = cli.root / f"no {name}"
        folder.mkdir()
        shutil.copy(cli.root / "good/run.json", folder)
        if name == "checkpoints":
            (folder / name).write_text("")
        else:
            (folder / name).mkdir()
        every = ("train.steps=2", "train.checkpoint_every=1")
        assert cli("variant=lora", *every, f"run_dir={folder}") == 1
        assert cli.err.startswith("error: ") and str(folder) in cli.err, cli.err
        assert cli.err.count("\n") == 1 and not (folder / "result.json").is_file()


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(cli):
    """No file may be longer: one of the first, a checkpoint, a part of the adapter is."""
    resource = pytest.importorskip("resource")
    run = ["variant=lora", "variant.lr=0.01"]
    assert cli(*run, f"run_dir={cli.root / 'whole'}") == 0, cli.err
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (500, 3_000, 60_000):
        folder = cli.root / str(most)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            code = cli(*run, f"run_dir={folder}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert code == 1 and cli.err.startswith("error: ") and cli.err.count("\n") == 1, cli.err
        assert "could not be written: " in cli.err and "too large" in cli.err, cli.err
        assert str(cli.root) in cli.err
        assert not (folder / "result.json").exists()
        assert cli(*run, f"run_dir={folder}") == 0, cli.err
        assert comparable(cli.root / "whole") == comparable(folder)
        same_adapter(cli.root / "whole", folder)


def test_a_run_that_ends_not_finite_is_failed(cli):
    command = ["variant=lora", "variant.lr=1e30", "train.clip_norm=null", "train.steps=1"]
    assert cli(*command) == 1
    assert cli.result()["status"] == "failed" and "not finite" in cli.err
    assert not list(cli.root.rglob("step-*")), "what is not finite is no good state"


def test_a_written_base_or_a_wrong_merge_is_no_result(cli, monkeypatch):
    def merge(layer):
        layer.merged_weight = 3 * layer.adapted_weight().flip(0)

    with monkeypatch.context() as patch:
        patch.setattr(variants.AdapterLinear, "merge", merge)
        assert cli("variant=lora", f"run_dir={cli.root / 'merge'}") == 1
    assert "the merged model's logits differ" in cli.err
    assert cli.result(cli.root / "merge")["status"] == "failed"

    def after_step(layer, step):
        layer.store.weight.data.add_(1e-3)

    with monkeypatch.context() as patch:
        patch.setattr(variants.LoraLinear, "after_step", after_step)
        assert cli("variant=lora", f"run_dir={cli.root / 'base'}") == 1
    assert "something wrote the frozen base" in cli.err
    assert cli.result(cli.root / "base")["status"] == "failed"

    real = checkpoint.load  # the base of the first session counts
    with monkeypatch.context() as patch:
        patch.setattr(harness.loop.step, "training_step", ended_after(5))
        with pytest.raises(KeyboardInterrupt):
            cli("variant=lora", f"run_dir={cli.root / 'parts'}")
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint, "load", lambda *a, **o: {**real(*a, **o), "fingerprint_before": "x"}
        )
        assert cli("variant=lora", f"run_dir={cli.root / 'parts'}") == 1
    assert "something wrote the frozen base" in cli.err


def test_changed_data_is_not_taken_for_the_same_run(cli):
    assert cli("variant=lora") == 0
    with open(cli.root / "data/test.csv", "a") as file:
        file.write("one more film,good\n")
    assert cli("variant=lora") == 1
    assert "the data changed since" in cli.err
    assert cli("variant=lora", "force=true") == 0


def test_recomputed_activations_change_nothing(cli):
    for name, override in {
        "plain": "train.activation_checkpointing=false",
        "recomputed": "train.activation_checkpointing=true",
    }.items():
        run = [override, f"run_dir={cli.root / name}", "dropout=0.1"]
        assert cli("variant=dora", *run) == 0, cli.err
    same_adapter(cli.root / "plain", cli.root / "recomputed")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # inductor's own
def test_a_compiled_model_learns_the_same(cli):
    for compiled in ("false", "true"):
        run = [f"train.compile={compiled}", f"run_dir={cli.root / compiled}"]
        assert cli("variant=lora", *run) == 0, cli.err
    one, other = (cli.result(cli.root / name) for name in ("false", "true"))
    assert one["test"]["loss_nats"] == pytest.approx(other["test"]["loss_nats"], abs=1e-3)


def test_bfloat16_storage_and_compute(cli):
    assert cli("variant=dora", "model.dtype=bfloat16", "train.compute_dtype=bfloat16") == 0, cli.err
    state = load_file(cli.folders()[-1] / "adapter/native.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize(("dtype", "code"), [("bfloat16", 0), ("float32", 1)])
def test_a_bfloat16_language_model_that_computes_in_float32(cli, monkeypatch, dtype, code):
    """Its layers hand on bfloat16, which rounding may turn by a digit where they are merged: here
    by as much, since whether it does depends on the processor."""
    text = cli.root / "text.txt"
    text.write_text("\n\n".join(f"paragraph {i}, of number {i * i}" for i in range(60)))
    files = [f"task.files.{split}={text}" for split in ("train", "validation", "test")]
    task = ["task=local_text", "task.max_tokens=40", *files]
    real, measured = laws.merged_max_abs_diff, []

    def turned(*arguments):
        measured.append(real(*arguments))
        return 10 * MERGE_TOLERANCE["float32"]

    monkeypatch.setattr(laws, "merged_max_abs_diff", turned)
    assert cli("variant=lora", "model=tiny_llama", f"model.dtype={dtype}", *task) == code, cli.err
    assert measured[0] <= MERGE_TOLERANCE[dtype]
    if dtype == "bfloat16":
        assert cli.result()["merged_max_abs_diff"] < MERGE_TOLERANCE["bfloat16"]
    else:
        assert cli.result()["failure"] == "BrokenLaw"


def test_a_run_that_tunes_does_not_look_at_test(cli):
    assert cli("variant=lora") == 0, cli.err
    assert cli("variant=lora", "train.evaluate_test=false") == 0, cli.err
    runs = [cli.result(folder) for folder in cli.folders()]
    tuning = next(run for run in runs if run["test"] is None)
    (other,) = (run for run in runs if run["test"] is not None)
    assert tuning["validation"] == other["validation"]
    assert tuning["run_key"] != other["run_key"]
    assert tuning["control_hash"] == other["control_hash"]  # they may stand in one study
    folder = next(f for f in cli.folders() if cli.result(f)["test"] is None)
    rows = (folder / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(row)["split"] for row in rows} == {"validation"}
    assert "validation" in cli.out and "\ntest" not in cli.out


def test_two_processes_do_not_share_a_folder(tmp_path):
    first, second = (RunFolder(tmp_path / "run", "key", {}) for _ in range(2))
    first.create({})
    with pytest.raises(ValueError, match="another process is running in"):
        second.create({})
    del first
    second.create({})


def test_a_run_that_another_process_finished_meanwhile_is_left_alone(tmp_path):
    late = RunFolder(tmp_path / "run", "key", {})  # looks before the other is done
    first = RunFolder(tmp_path / "run", "key", {})
    first.create({})
    first.write_lines("metrics.jsonl", [{"step": 1}])
    first.write_json("result.json", {"status": "complete"})
    del first
    with pytest.raises(ValueError, match="another process has finished"):
        late.create({})
    assert (tmp_path / "run/metrics.jsonl").read_text() == '{"step": 1}\n'
    forced = RunFolder(tmp_path / "run", "key", {}, force=True)
    forced.create({})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "run.json"}


def test_multirun_and_globs(cli):
    assert cli("-m", "variant=lora,head", "seed=0,1", "train.steps=2") == 0, cli.err
    assert len(cli.folders()) == 4
    assert {cli.result(folder)["seed"] for folder in cli.folders()} == {0, 1}


def test_the_rate_test_suggests_a_grid(cli):
    assert cli("variant=lora", "rate_test=true") == 0, cli.err
    assert "a grid to tune on validation" in cli.out
    files = sorted((cli.root / "outputs").iterdir())
    assert [path.suffix for path in files] == [".json", ".svg"]
    assert all(path.name.startswith("rate_test-lora-s0-") for path in files)
    assert json.loads(files[0].read_text())["config"]["rank"] == 8
    assert cli("variant=lora", "rate_test=true", "dry_run=true") == 1 and "choose one" in cli.err


class Line:
    """A task with a known answer: y = x (W + U)^T with U of rank 2."""

    def __init__(self, W: torch.Tensor):
        generator = torch.Generator().manual_seed(1)
        o, i = W.shape
        U = torch.randn(o, 2, generator=generator) @ torch.randn(2, i, generator=generator)
        self.x = torch.randn(256, i, generator=generator)
        self.y = self.x @ (W + 0.3 * U).T
        self.inputs = {"input_ids": self.x}
        self.labels = torch.zeros(256)
        self.learned = self.n_tokens = 256

    def to(self, device):
        return self

    @staticmethod
    def loss(model, batch):
        return (model(batch.x) - batch.y).square().mean()


def linear_run(variant, steps: int, **record):
    """Train one adapted linear layer on `Line` with the loop's own step; the losses."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 9))
    task = Line(model[0].weight.detach().clone())
    with torch.no_grad():
        task.y += model[0].bias
    layers = variants.inject(model, variant, seed=0)
    optimizer = torch.optim.AdamW(variant.groups(model, lr=variant.lr))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    allocator = record.get("allocator")
    arguments = {
        "model": model, "layers": layers, "variant": variant, "optimizer": optimizer,
        "allocator": allocator, "loss": Line.loss, "device": torch.device("cpu"), "seed": 0,
    }  # fmt: skip
    return [
        harness.loop.step.training_step(
            step, batches=iter([task] * 9), rate_factor=1.0, **arguments
        ).loss_nats
        for step in range(1, steps + 1)
    ]


def make(adapter=variants.LoraLinear, **options) -> variants.Variant:
    return variants.Variant(
        name="x", lr=0.02, adapter=partial(adapter, rank=2, alpha=2, **options),
        groups=variants.by_role,
    )  # fmt: skip


def test_a_task_of_rank_two_is_solved_at_rank_two():
    losses = linear_run(make(), 400)
    assert losses[-1] < 1e-4 * losses[0]


def test_hooks_run_after_the_step_and_before_the_gradients_are_cleared():
    calls = []

    class Recorder(variants.LoraLinear):
        def after_step(self, step):
            calls.append(("layer", step, self.A.grad is not None, float(self.B.detach().norm())))

    class Allocator:
        def after_step(self, layers, optimizer, step):
            (layer,) = layers.values()
            calls.append(("allocator", step, layer.A.grad is not None))
            return {"rank/seen": 1.0}

    linear_run(make(Recorder), 2, allocator=Allocator())
    assert [call[:3] for call in calls] == [
        ("layer", 1, True), ("allocator", 1, True), ("layer", 2, True), ("allocator", 2, True),
    ]  # fmt: skip
    assert calls[0][3] > 0, "the hook must see stepped parameters"


def test_every_microstep_of_every_step_drops_other_inputs():
    """An adapter's and the base model's own alike, though the rows are the same."""
    losses = {}
    for kind in ("adapter", "base"):
        base, task = eight_rows("classification")
        for module in base.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5 if kind == "base" else 0.0
        variant = make(dropout=0.5 if kind == "adapter" else 0.0, init_B="kaiming")
        layers = variants.inject(base.model, variant, seed=0)
        optimizer = torch.optim.SGD(variant.groups(base.model, lr=0.1))
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        losses[kind] = []

        def loss(model, batch, kind=kind, task=task):
            found = task.loss(model, batch)
            losses[kind].append(float(found.detach()))
            return found

        for step in (1, 1, 2):
            harness.loop.step.training_step(
                step, model=base.model.train(), layers=layers, variant=variant, optimizer=optimizer,
                allocator=None, loss=loss, batches=iter([task._batch("train", [0, 1])] * 3),
                device=torch.device("cpu"), seed=0, rate_factor=0.0, accumulation=3,
            )  # fmt: skip
        assert losses[kind][:3] == losses[kind][3:6]  # a step is a function of its number
        assert len(set(losses[kind])) == 6


@pytest.mark.parametrize(("absolute_factor", "rate_of_A"), [(None, 0.05), (1.0, 0.5), (0.5, 0.25)])
def test_an_absolute_rate_is_held_where_the_others_are_tried(absolute_factor, rate_of_A):
    """As the rate test does; a schedule moves all."""
    model = torch.nn.Sequential(torch.nn.Linear(12, 9))
    task = Line(model[0].weight.detach().clone())
    layers = variants.inject(model, make(), seed=0)
    groups = variants.by_role(model, lr=0.02, module_rates={"A": 0.5})
    optimizer = torch.optim.SGD(groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    harness.loop.step.training_step(
        1, model=model, layers=layers, variant=make(), optimizer=optimizer, allocator=None,
        loss=Line.loss, batches=iter([task]), device=torch.device("cpu"), seed=0,
        rate_factor=0.1, absolute_factor=absolute_factor,
    )  # fmt: skip
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"A": rate_of_A, "B": 0.002})


def test_the_norms_of_a_row_of_metrics_are_those_of_dense_matrices():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 9))
    W = model[0].weight.detach().double().clone()
    layers = variants.inject(model, make(init_B="kaiming"), seed=0)
    layer = layers["0"]
    layer.scale = 0.7
    row = meter.factor_norms(layers, build.base_norms(layers))
    B, A = (factor.detach().double() for factor in (layer.B, layer.A))
    expected = {"norm/A/0": A.norm(), "norm/B/0": B.norm(),
                "norm/relative/0": 0.7 * (B @ A).norm() / W.norm()}  # fmt: skip
    assert row == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)


# ---- what one part hands to another --------------------------------------------------------------


def test_the_allocator_hears_of_the_signal_slice_alone(cli, monkeypatch):
    made, heard, measured = [], [], {}
    allocator, task = variants.EnergyAllocator, classification.TextClassification
    init, after_evaluation, evaluate = (
        allocator.__init__, allocator.after_evaluation, task.evaluate
    )  # fmt: skip

    def hearing(self, layers, optimizer, step, loss_nats):
        heard.append((step, loss_nats))
        return after_evaluation(self, layers, optimizer, step, loss_nats)

    def measuring(self, model, split, *, batch_size, **options):
        assert batch_size == 5
        found = evaluate(self, model, split, batch_size=batch_size, **options)
        measured.setdefault(split, []).append(found.metrics["loss_nats"])
        return found

    @wraps(init)
    def making(self, layers, *, total_steps, seed, **settings):
        made.append({"total_steps": total_steps, "seed": seed})
        init(self, layers, total_steps=total_steps, seed=seed, **settings)

    monkeypatch.setattr(allocator, "__init__", making)
    monkeypatch.setattr(allocator, "after_evaluation", hearing)
    monkeypatch.setattr(task, "evaluate", measuring)
    run = ("task.signal_rows=8", "train.eval_every=2", f"run_dir={cli.root / 'run'}", "seed=3",
           "train.eval_batch_size=5")  # fmt: skip
    assert cli(*options("adalora"), *run) == 0, cli.err
    assert made == [{"total_steps": 8, "seed": 3}]
    assert heard == list(zip((2, 4, 6), measured["signal"], strict=True))
    assert set(measured["signal"]).isdisjoint(measured["validation"] + measured["test"])
    rows = [json.loads(line) for line in (cli.root / "run/metrics.jsonl").read_text().splitlines()]
    said = [row["eval/loss_nats"] for row in rows if "eval/loss_nats" in row]
    assert said == measured["validation"]
    result = cli.result(cli.root / "run")
    assert result["validation"]["loss_nats"] == said[-1]
    assert [result["test"]["loss_nats"]] == measured["test"]


def test_variants_of_one_seed_learn_the_same_rows_in_every_step(cli, monkeypatch):
    real, seen = harness.loop.step.training_step, {}

    def watching(step, *, batches, variant, seed, **arguments):
        assert (arguments["accumulation"], arguments["clip_norm"]) == (2, 0.7)

        def noted():
            for batch in batches:
                seen.setdefault((variant.name, seed), []).append((step, batch.rows))
                yield batch

        return real(step, batches=noted(), variant=variant, seed=seed, **arguments)

    monkeypatch.setattr(harness.loop.step, "training_step", watching)
    small = ["train.accumulation=2", "train.steps=4", "train.evaluate_test=false",
             "train.clip_norm=0.7"]  # fmt: skip
    for variant in ("lora", "adalora"):
        assert cli(*options(variant), "dropout=0.1", *small) == 0, cli.err
    assert cli("variant=lora", "dropout=0.1", *small, "seed=1") == 0, cli.err
    rows = seen["lora", 0]
    assert [step for step, _ in rows] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert seen["adalora", 0] == rows
    assert seen["lora", 1] != rows


SCHEDULES = {  # of 8 steps, with a quarter of warm-up
    "constant": [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1],
    "linear": [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
    "cosine": [1 / 3, 2 / 3, 1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873],
}


def test_the_rate_is_the_schedules_in_every_step_of_a_run(cli):
    """For every group, a head of its own rate among them."""
    applied, name = [], "cosine"

    def note(optimizer, *_):
        applied.append({(g["lr"], g.get("initial_lr")) for g in optimizer.param_groups})

    hook = register_optimizer_step_pre_hook(note)
    try:
        run = (f"schedule={name}", "schedule.warmup_frac=0.25", "train.log_every=1")
        assert cli("variant=lora", "variant.lr=0.002", *run) == 0, cli.err
    finally:
        hook.remove()
    applied = applied[-8:]  # the estimate of memory steps too
    for pairs, factor in zip(applied, SCHEDULES[name], strict=True):
        assert {initial for _, initial in pairs} == {0.002, 0.005}
        assert all(lr == pytest.approx(initial * factor, rel=1e-6) for lr, initial in pairs)
    (folder,) = cli.folders()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    said = [row["train/lr"] / 0.002 for row in rows]
    assert said == pytest.approx(SCHEDULES[name], rel=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_warms_up_and_falls(name):
    decay = getattr(schedule, name)
    warmed = [decay(step, 8, warmup_frac=0.25) for step in range(1, 9)]
    assert warmed == pytest.approx(SCHEDULES[name], rel=1e-6)
    first, last = {"constant": (1, 1), "linear": (1, 1 / 8), "cosine": (1, 0.0380602)}[name]
    assert (decay(1, 8), decay(8, 8)) == pytest.approx((first, last), rel=1e-6)


def test_a_share_of_the_steps_is_rounded_to_whole_ones():
    """0.29 * 100 is less than 29 in floating point."""
    for decay in (schedule.constant, schedule.linear, schedule.cosine):
        assert decay(29, 100, warmup_frac=0.29) == pytest.approx(29 / 30)
        assert decay(30, 100, warmup_frac=0.29) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_steps_are_as_good_as_their_share(name):
    decay = getattr(schedule, name)
    for step in range(1, 9):
        share = decay(step, 8, warmup_frac=0.25)
        assert decay(step, 8, warmup_frac=0.5, warmup_steps=2) == share
    with pytest.raises(ValueError, match=r"warmup_steps is 8, which leaves none of 8 steps"):
        decay(1, 8, warmup_steps=8)
    with pytest.raises(ValueError, match=r"warmup_steps is -1; it must be at least 0"):
        decay(1, 8, warmup_steps=-1)
    with pytest.raises(ValueError, match=r"warmup_steps is 2.5; it must be"):
        decay(1, 8, warmup_steps=2.5)


def falling(rates, steepest, minimum):
    """A loss that falls by 1 nat as a logistic curve in log rate and rises after `minimum`."""
    below = 1 / (1 + (steepest / rates) ** 3)
    return 2 - below + np.maximum(0, np.log10(rates / minimum))


def test_the_rate_of_the_steepest_fall_is_suggested():
    rates = np.geomspace(1e-6, 1e-1, 80)
    for at in (20, 40, 55):
        losses = falling(rates, rates[at], rates[at + 20])
        losses[-6:] = [9, 9, 2.5, 2.4, 2.3, 2.2]  # a fall after the minimum is none
        rows = [{"rate": r, "smoothed_nats": n} for r, n in zip(rates, losses, strict=True)]
        assert rate_test.suggest(rows) == rates[at]


def test_a_rate_test_raises_rates_geometrically_and_stops_where_the_loss_has_risen(tmp_path):
    asked = []

    def take_step(number, *, batches, rate_factor, absolute_factor):
        asked.append(rate_factor)
        assert absolute_factor == 1.0
        if len(asked) == stop:
            raise harness.loop.step.NonFiniteLoss("diverged")
        loss = falling(np.float64(rate_factor), 0.1, 1.0) if rate_factor < 10 else 9.0
        return StepResult(float(loss), 0.0, 1.0, 1, (1, 1), {}, 0.0, 0.0)

    settings = SimpleNamespace(config={"variant": {"lr": 0.02}}, outputs_dir=str(tmp_path))
    wanted = np.geomspace(1e-3, 1e2, rate_test.STEPS)
    for stop in (None, 50):
        asked.clear()
        rate_test.run(take_step, iter(()), settings, "x")
        assert asked == pytest.approx(wanted[: len(asked)])
        written = json.loads((tmp_path / "rate_test-x.json").read_text())
        rows, grid = written["rows"], written["grid"]
        assert [row["rate"] for row in rows] == pytest.approx(0.02 * wanted[: len(rows)])
        assert len(rows) == (49 if stop else len(asked))
        losses = [row["loss_nats"] for row in rows]
        weights = 0.9 ** np.arange(len(rows))[::-1]  # an exponential mean, from its first value on
        smoothed = float(np.sum(weights * losses) / np.sum(weights))
        assert rows[-1]["smoothed_nats"] == pytest.approx(smoothed)
        if stop is None:  # the loss jumps at 64 of 80 steps, its mean soon after
            assert 64 < len(rows) < 70
        assert grid == pytest.approx([grid[-1] * 10 ** (-half / 2) for half in (4, 3, 2, 1, 0)])
        assert grid[-1] == rate_test.suggest(rows)


# ---- a finished run ------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "left"), [("2", False), ("null", True)])
def test_checkpoints_that_outlived_a_result_are_removed(cli, keep, left):
    """Of a run that was killed between the two."""
    run = ["variant=lora", f"train.keep_checkpoints={keep}", f"run_dir={cli.root / 'run'}"]
    assert cli(*run) == 0, cli.err
    (cli.root / "run/checkpoints/step-00000099").mkdir(parents=True)
    assert cli(*run) == 0 and "is complete already" in cli.out
    assert (cli.root / "run/checkpoints").exists() == left


# ---- one step, against autograd on single rows ---------------------------------------------------


class Pulled(variants.LoraLinear):
    def penalty(self):
        return self.A.square().sum() + self.B.sum()


def eight_rows(kind: str):
    """A base with a task of 8 rows of different lengths: (base, task)."""
    words = [f"{'very ' * (5 * n % 7)}{('fine', 'dull')[n % 2]} {n}" for n in range(8)]
    torch.manual_seed(0)
    if kind == "classification":
        base = tiny.load(labels=("0", "1"), seed=0)
        rows = [classification.Row(n, text, str(n % 2)) for n, text in enumerate(words)]
        data = dict.fromkeys(("train", "validation", "test"), rows)
        task = classification.TextClassification("made", data, ("0", "1"), signal_rows=0)
    else:
        base = tiny.load(labels=None, seed=0, architecture="llama")
        rows = [turns.Row(n, (("user", "?"), ("assistant", text))) for n, text in enumerate(words)]
        data = dict.fromkeys(("train", "validation", "test"), rows)
        task = language.LanguageModelling("made", data, signal_rows=0, held_out_tokens=0)
    task.prepare(base.tokenizer, 64)
    return base, task


def loss_of_row(kind: str, model, task, n: int) -> tuple[torch.Tensor, int]:
    """The summed -log p of row n alone, unpadded, and the number of its targets."""
    ids = torch.tensor([task._tokens["train"]["input_ids"][n]])
    logits = model(input_ids=ids).logits.double().log_softmax(-1)[0]
    if kind == "classification":
        return -logits[n % 2] if logits.ndim == 1 else -logits[0, n % 2], 1
    labels = task._tokens["train"]["labels"][n]
    learned = [t for t in range(1, len(labels)) if labels[t] != -100]
    return -sum(logits[t - 1, labels[t]] for t in learned), len(learned)


def test_a_gradient_that_is_not_finite_is_no_step_though_the_loss_is():
    base, task = eight_rows("classification")
    variant = variants.Variant(
        name="x", lr=0.1, groups=variants.by_role, adapter=partial(Pulled, rank=2, alpha=2)
    )
    layers = variants.inject(base.model, variant, seed=0)
    groups = [{**group, "initial_lr": 0.1} for group in variant.groups(base.model, lr=0.1)]
    trained = [parameter for group in groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in trained]

    def loss(model, batch):  # sqrt(0) is 0, and its slope infinite
        return task.loss(model, batch) + (trained[0] * 0).sum().sqrt()

    with pytest.raises(harness.loop.step.NonFiniteLoss, match=r"loss \d.* gradient norm nan"):
        harness.loop.step.training_step(
            1, model=base.model, layers=layers, variant=variant, optimizer=torch.optim.SGD(groups),
            allocator=None, loss=loss, batches=iter([task._batch("train", range(8))]),
            device=torch.device("cpu"), seed=0, rate_factor=1.0, accumulation=1, clip_norm=1.0,
        )  # fmt: skip
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(trained, before, strict=True))


@pytest.mark.parametrize("kind", ["classification", "language"])
@pytest.mark.parametrize(
    ("rows", "clip_norm"), [(8, None), (4, None), (2, None), (1, None), (2, 0.01)]
)
def test_rows_count_alike_in_however_many_microsteps(kind, rows, clip_norm):
    """The mean over the step, its gradient with the penalty's, clipped once: SGD's change."""
    base, task = eight_rows(kind)
    weight, lr = 0.3, 0.5
    variant = variants.Variant(
        name="x", lr=lr, groups=variants.by_role, penalty_weight=weight, penalty_reduction="sum",
        adapter=partial(Pulled, rank=2, alpha=2),
    )  # fmt: skip
    layers = variants.inject(base.model, variant, seed=0)
    groups = [{**group, "lr": lr} for group in variant.groups(base.model, lr=lr)]
    for group in groups:
        group["weight_decay"] = 0.0
    trained = [parameter for group in groups for parameter in group["params"]]
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.05 * torch.randn(parameter.shape)
    summed, counts = zip(*(loss_of_row(kind, base.model, task, n) for n in range(8)), strict=True)
    expected = sum(summed) / sum(counts)
    penalty = weight * sum(layer.penalty() for layer in layers.values())
    gradient = torch.autograd.grad(expected + penalty, trained)
    norm = torch.cat([g.flatten().double() for g in gradient]).norm().item()
    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
    before = [parameter.detach().clone() for parameter in trained]

    optimizer = torch.optim.SGD(groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    one = (lambda n: [n]) if kind == "language" else (lambda n: n)
    chosen = [[one(n) for n in range(start, start + rows)] for start in range(0, 8, rows)]
    done = harness.loop.step.training_step(
        1, model=base.model.eval(), layers=layers, variant=variant, optimizer=optimizer,
        allocator=None, loss=task.loss, batches=(task._batch("train", part) for part in chosen),
        device=torch.device("cpu"), seed=0, rate_factor=1.0, accumulation=8 // rows,
        clip_norm=clip_norm, norms=True,
    )  # fmt: skip
    role = {id(p): group["name"] for group in groups for p in group["params"]}
    assert {"A", "B"} <= set(role.values()) == set(done.role_norms)
    for name, found in done.role_norms.items():
        own = [g for g, p in zip(gradient, trained, strict=True) if role[id(p)] == name]
        own_norm = torch.cat([g.flatten().double() for g in own]).norm().item()
        assert found == pytest.approx(own_norm, rel=1e-4)
    assert done.loss_nats == pytest.approx(expected.item(), rel=1e-5)
    assert done.penalty == pytest.approx(penalty.item(), rel=1e-5)
    assert done.grad_norm == pytest.approx(norm, rel=1e-4)
    assert done.tokens == sum(map(len, task._tokens["train"]["input_ids"]))
    for parameter, old, g in zip(trained, before, gradient, strict=True):
        change = (parameter.detach() - old).double()
        torch.testing.assert_close(change, -lr * factor * g.double(), rtol=1e-3, atol=2e-7)
    if clip_norm is not None:
        moved = torch.cat(
            [(p.detach() - b).flatten() for p, b in zip(trained, before, strict=True)]
        )
        assert moved.double().norm().item() == pytest.approx(lr * clip_norm, rel=1e-3)
