"""python -m harness.bench: what it times, what it prints and writes. No time is asserted."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from harness import bench

# peft reads an attribute that transformers renamed in 5.20.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

SMALL = ("--model", "tiny", "--tokens", "3x5", "--rank", "2", "--rounds", "1")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*options):
    bench.main([*SMALL, "--threads", "1", *options])


def rows_of(tmp_path, capsys, *options):
    """The rows of the JSON file, and what was printed."""
    run(*options, "--json", str(tmp_path / "bench.json"))
    found = json.loads((tmp_path / "bench.json").read_text())
    keys = ("rows", "tokens", "rank", "alpha", "threads", "rounds")
    assert [found["settings"][key] for key in keys] == [3, 5, 2, 4, 1, 1]
    return found["rows"], capsys.readouterr().out


def row_of(rows, name):
    return next(row for row in rows if row["name"] == name)


def test_every_variant_is_measured_beside_its_peer(tmp_path, capsys):
    rows, printed = rows_of(tmp_path, capsys, "--dropout", "0")
    names = [row["name"] for row in rows]
    assert names[0] == "floor" and names[-1] == "every parameter"
    peers = ["peft LoRA", "peft DoRA", "peft AdaLoRA"]
    assert sorted(names[1:-1]) == sorted([*peers, *bench.variant_names()])
    assert row_of(rows, "lora_plus")["peer"] == "peft LoRA"
    assert row_of(rows, "adalora_budget")["peer"] == "peft AdaLoRA"
    assert row_of(rows, "qlora")["peer"] is row_of(rows, "qlora")["step_over_peer"] is None

    floor = row_of(rows, "floor")["seconds"][0][1]
    for row in rows:
        [(forward_backward, step)] = row["seconds"]
        assert 0 < forward_backward <= step == row["step_s"]
        assert row["step_over_floor"]["median"] == pytest.approx(step / floor)
        assert row["forward_backward_over_floor"]["median"] == pytest.approx(
            forward_backward / floor
        )
        assert row["step_over_floor"]["low"] is None  # one round has no interval
        if row["peer"]:
            peer = row_of(rows, row["peer"])["seconds"][0][1]
            assert row["step_over_peer"]["median"] == pytest.approx(step / peer)
    assert "3 x 5 tokens, rank 2" in printed and "n = 1 rounds" in printed
    assert [line.split("  ")[0] for line in printed.splitlines()[3:]] == names


def test_dropout_has_rows_of_its_own(tmp_path, capsys):
    rows, _ = rows_of(tmp_path, capsys, "--variant", "dora", "--variant", "full")
    assert [(row["name"], row["peer"]) for row in rows[1:-1]] == [
        ("peft DoRA", None),
        ("dora", "peft DoRA"),
        ("peft DoRA, dropout 0.1", None),
        ("dora, dropout 0.1", "peft DoRA, dropout 0.1"),
        ("full", None),  # it has no dropout
    ]


def test_rows_can_be_chosen(tmp_path, capsys):
    names = ("--variant", "dora", "--variant", "head", "--variant", "dora", "--dropout", "0")
    rows, _ = rows_of(tmp_path, capsys, *names, "--no-peer")
    assert [row["name"] for row in rows] == ["floor", "dora", "head", "every parameter"]
    assert all(row["peer"] is None for row in rows)


def test_without_peft_its_rows_are_left_out_and_that_is_said(capsys, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    run("--variant", "lora", "--dropout", "0")
    printed = capsys.readouterr().out
    assert 'peft is not installed, so its rows are left out: pip install -e ".[peers]"' in printed
    assert "peft LoRA" not in printed and "\nlora " in printed


def test_the_floor_trains_nothing_and_every_other_row_trains(monkeypatch):
    models = []  # one a row

    def deepcopy(model):
        models.append(copy.deepcopy(model))
        return models[-1]

    monkeypatch.setattr(bench, "copy", SimpleNamespace(deepcopy=deepcopy))
    base = bench.load_base("tiny")
    start = copy.deepcopy(base.model.state_dict())
    common = bench.Bench(base=base, batch=bench.draw_batch(base, 3, 5), rank=3, dropout=0.1)
    rows = bench.all_rows(common, ["lora", "full"], bench.PEERS)
    bench.measure(rows, 1)
    names = [row.name for row in rows]
    assert len(models) == len(names)

    counts = {}
    for name, model in zip(names, models, strict=True):
        named = [(path, p) for path, p in model.named_parameters() if p.requires_grad]
        counts[name] = sum(p.numel() for _, p in named)
        assert all(p.grad is None for p in model.parameters())
        if name == bench.FLOOR:
            assert not named
            assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
            continue
        [weight] = [p for path, p in named if re.search(r"classifier.*weight$", path)]
        assert not torch.equal(weight, start["classifier.weight"])
        if "lora" in name.lower():  # B started at zero
            factors = [p for path, p in named if re.search(r"\.B$|lora_B", path)]
            assert len(factors) == 13 and all(p.any() for p in factors)
    assert counts["lora"] == counts["peft LoRA"]  # the same layers, and the head


@pytest.mark.parametrize("n", range(1, 40))
def test_the_interval_encloses_the_median_in_95_of_100(n):
    found = bench.median_interval([float(i) for i in range(n)][::-1])
    assert found["median"] == (n - 1) / 2
    k = int(stats.binom.ppf(0.025, n, 0.5))  # P(X <= k - 1) <= 0.025
    if stats.binom.cdf(k, n, 0.5) <= 0.025:
        k += 1
    if k == 0:
        assert n < 6 and found["low"] is found["high"] is None
    else:
        assert (found["low"], found["high"]) == (k - 1, n - k)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--variant", "dorra"), "no variant 'dorra' in conf/variant. Did you mean dora?"),
        (("--model", "minlm"), "no model 'minlm' in conf/model. Known: "),
        (("--variant", "dora", "--rank", "37"), "rank is 37"),
        (("--rank", "0"), "--rank: 0 is not a whole number of at least 1"),
        (("--tokens", "3x301"), "tiny-bert takes at most 300 tokens; found 301"),
        (("--tokens", "32"), "--tokens: 32 is not <rows>x<tokens>, for example 32x32"),
        (("--tokens", "3xa"), "--tokens: 3xa is not <rows>x<tokens>, for example 32x32"),
        (("--dropout", "1"), "--dropout: 1 is not in [0, 1)"),
        (("--dropout", "x"), "--dropout: x is not in [0, 1)"),
        (("--rounds", "-1"), "--rounds: -1 is not a whole number of at least 1"),
        (("--variants", "lora"), "unrecognized arguments"),
        (("--variant", "head", "--json", "no/such/folder/x.json"), "no/such/folder"),
    ],
)
def test_a_mistake_is_one_sentence(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--no-peer", *options)
    code = stopped.value.code  # or a message, which Python prints and exits with 1
    text = capsys.readouterr().err.rstrip("\n") if code == 1 else code
    assert text.startswith("error: ") and message in text and "\n" not in text
