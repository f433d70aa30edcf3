"""python -m harness.bench: what it times, counts, prints and writes. No time is asserted."""

import copy
import json
import re

import pytest
import torch
from scipy import stats
from torch import nn

from harness.bench import __main__ as bench
from harness.bench import measure, profile, report, rows
from harness.machine import timing
from harness.models import tiny

# peft reads an attribute that transformers renamed in 5.20.
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

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


@pytest.fixture
def few_variants(monkeypatch):
    """One of each kind that a bench treats in its own way, in place of all."""
    few = ["lora", "qlora", "bitfit", "full"]
    monkeypatch.setattr("harness.bench.__main__.variant_names", lambda: few)


def row_of(found, name):
    return next(row for row in found if row["name"] == name)


def test_every_variant_is_measured_beside_its_peer_and_over_its_floor(tmp_path, capsys):
    found, printed = rows_of(tmp_path, capsys, "--dropout", "0")
    names = [row["name"] for row in found]
    floors = ["floor", "floor, int8", "floor, nf4", "floor, bitsandbytes"]
    peers = [f"peft {method}{kind}" for method in ("LoRA", "DoRA", "AdaLoRA")
             for kind in ("", ", bitsandbytes")]  # fmt: skip
    assert names[:4] == floors and names[-1] == "every parameter"
    assert sorted(names[4:-1]) == sorted([*peers, *rows.variant_names()])
    of = {name: (row_of(found, name)["floor"], row_of(found, name)["peer"]) for name in names}
    assert of["floor"] == ("floor", None)
    assert of["floor, nf4"] == ("floor", "floor, bitsandbytes")
    assert of["floor, int8"] == ("floor", None)
    assert of["lora8bit"] == ("floor, int8", None)
    assert of["lora_plus"] == ("floor", "peft LoRA")
    assert of["adalora_budget"] == ("floor", "peft AdaLoRA")
    assert of["qdora"] == ("floor, nf4", "peft DoRA, bitsandbytes")
    assert of["peft DoRA, bitsandbytes"] == ("floor, bitsandbytes", None)
    assert of["bitfit"] == ("floor", None)

    def step(name):
        return row_of(found, name)["seconds"][0][1]

    for row in found:
        [(passes, whole)] = row["seconds"]
        assert 0 < passes <= whole == row["step_s"]
        assert row["step_over_floor"]["median"] == pytest.approx(whole / step(row["floor"]))
        assert row["passes_over_floor"]["median"] == pytest.approx(passes / step(row["floor"]))
        assert row["tokens_per_s"] == pytest.approx(15 / whole)
        assert row["step_over_floor"]["low"] is None  # one round has no interval
        floor = row_of(found, row["floor"])["peak_bytes"]
        assert row["peak_over_floor"] == row["peak_bytes"] / floor
        if row["peer"]:
            assert row["step_over_peer"]["median"] == pytest.approx(whole / step(row["peer"]))
            assert row["peak_over_peer"] == pytest.approx(
                row["peak_bytes"] / row_of(found, row["peer"])["peak_bytes"]
            )
    allocating = {row["name"] for row in found if row["allocation_s"] is not None}
    assert allocating == {"adalora", "adalora_budget", "qadalora", "peft AdaLoRA",
                          "peft AdaLoRA, bitsandbytes"}  # fmt: skip
    assert "3 x 5 tokens, rank 2" in printed and "n = 1 rounds" in printed
    lines = printed.splitlines()
    assert [line[: len("floor, bitsandbytes") + 7].strip() for line in lines[3 : 3 + len(names)]] \
        == names  # fmt: skip
    assert sum("its allocator's step takes" in line for line in lines) == len(allocating)


def test_dropout_has_rows_of_its_own(tmp_path, capsys):
    found, _ = rows_of(tmp_path, capsys, "--variant", "dora", "--variant", "full")
    assert [(row["name"], row["peer"]) for row in found[1:-1]] == [
        ("peft DoRA", None),
        ("dora", "peft DoRA"),
        ("peft DoRA, dropout 0.1", None),
        ("dora, dropout 0.1", "peft DoRA, dropout 0.1"),
        ("full", None),  # it has no dropout
    ]


def test_rows_can_be_chosen(tmp_path, capsys):
    names = ("--variant", "dora", "--variant", "head", "--variant", "dora", "--dropout", "0")
    found, _ = rows_of(tmp_path, capsys, *names, "--no-peer")
    assert [row["name"] for row in found] == ["floor", "dora", "head", "every parameter"]
    assert all(row["peer"] is None for row in found)


@pytest.mark.parametrize(
    ("operation", "shapes", "kind"),
    [
        ("aten::mm", [[1024, 384], [384, 384]], profile.WIDE),
        ("aten::mm", [[9, 384], [384, 384]], profile.WIDE),
        ("aten::mm", [[8, 384], [384, 1024]], profile.SKINNY),
        ("aten::addmm_", [[1024, 384], [1024, 8], [8, 384], [], []], profile.SKINNY),
        ("aten::addmm", [[384], [1024, 1536], [1536, 384], [], []], profile.WIDE),
        ("aten::bmm", [[2, 512, 384], [2, 384, 8]], profile.SKINNY),
        ("aten::bmm", [[2, 512, 384], [2, 384, 384]], profile.WIDE),  # 2 is no side
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [[2, 2, 8, 8]], profile.ATTENTION),
        ("aten::gelu_backward", [[8, 8], [8, 8]], profile.PASSES),
        ("aten::_fused_adamw_", [[]], profile.OPTIMIZER),
        ("SomeBackward0", [[8, 8]], profile.OTHER),
    ],
)
def test_kinds_of_operations(operation, shapes, kind):
    assert profile.kind_of(operation, shapes, rank=8) == kind


def test_a_profile_says_what_a_step_is_made_of(tmp_path, capsys):
    found, printed = rows_of(
        tmp_path, capsys, "--variant", "lora", "--dropout", "0", "--no-peer", "--profile"
    )
    of = {row["name"]: row["profile_s"] for row in found}
    assert all(set(kinds) == set(profile.KINDS) for kinds in of.values())
    # The classifier's two labels are as narrow as the rank; the adapters are all that is beyond.
    assert of["lora"][profile.SKINNY] > of["floor"][profile.SKINNY]
    assert min(kinds[profile.WIDE] for kinds in of.values()) > 0
    assert of["floor"][profile.OPTIMIZER] == 0 < of["lora"][profile.OPTIMIZER]
    assert "profile, ms (% of its floor)" in printed and "low-rank products" in printed


def test_rows_share_the_frozen_matrices_and_nothing_else():
    base = rows.load_base("tiny")
    before = {path: value.clone() for path, value in base.model.state_dict().items()}
    common = rows.Bench(base=base, batch=rows.draw_batch(base, 3, 5), rank=2, dropout=0.0)
    made = rows.all_rows(common, ["lora", "bitfit", "full"], peers=True)
    for row in made:
        measure.timed(row, rows.FIRST_STEP)
    for path, value in base.model.state_dict().items():
        assert torch.equal(value, before[path]), path
    word = "embeddings.word_embeddings.weight"
    held = {
        row.name: next(p for path, p in row.model.named_parameters() if path.endswith(word))
        for row in made
    }
    own = {name for name, p in held.items() if p.data_ptr() != held["floor"].data_ptr()}
    assert own == {"every parameter"} and not held["lora"].requires_grad


def test_settings_of_the_device(tmp_path, capsys):
    options = ("--variant", "lora", "--dropout", "0", "--no-peer", "--no-full")
    found, printed = rows_of(tmp_path, capsys, *options, "--dtype", "bfloat16")
    assert [row["name"] for row in found] == ["floor", "lora"] and "bfloat16, n = 1" in printed
    whole, _ = rows_of(tmp_path, capsys, *options)
    assert row_of(found, "floor")["peak_bytes"] < 0.7 * row_of(whole, "floor")["peak_bytes"]
    with pytest.raises(SystemExit, match="--device is 'cuda:9', but this machine has"):
        run(*options, "--device", "cuda:9")


@pytest.mark.gpu
def test_a_gpu_is_waited_for(tmp_path, capsys):
    options = ("--device", "cuda", "--dtype", "bfloat16", "--variant", "qlora", "--dropout", "0")
    found, _ = rows_of(tmp_path, capsys, *options)
    assert all(row["peak_bytes"] > 0 and row["step_s"] > 0 for row in found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler and what it calls
def test_compiled_rows(tmp_path, capsys):
    options = ("--variant", "dora", "--dropout", "0", "--no-full", "--compile")
    found, printed = rows_of(tmp_path, capsys, *options)
    assert [row["name"] for row in found] == ["floor", "peft DoRA", "dora"]
    assert all(row["peak_bytes"] > 0 for row in found) and "compiled, n = 1" in printed


def test_variants_that_a_model_has_nothing_for_are_left_out(few_variants, capsys):
    options = ("--model", "tiny_llama", "--dropout", "0", "--no-peer", "--no-full")
    run(*options)
    printed = capsys.readouterr().out
    assert "bitfit is left out: bias=all would train nothing" in printed
    assert "\nqlora " in printed and "\nbitfit " not in printed
    assert "full is left out: it keeps no frozen weight" in printed and "\nfull  " not in printed
    with pytest.raises(SystemExit, match="bias=all would train nothing"):
        run(*options, "--variant", "bitfit")


@pytest.mark.parametrize("where", ["load_base", "measure", "profile.profile"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_too_little_memory_is_one_sentence(monkeypatch, where, error):
    def no_room(*_):
        raise error

    monkeypatch.setattr(f"harness.bench.__main__.{where}", no_room)
    sentence = r"not enough memory for all rows.*or give --no-full, fewer --tokens\.$"
    with pytest.raises(SystemExit, match=sentence):
        run("--variant", "lora", "--dropout", "0", "--no-peer", "--profile")


def test_without_full_none_is_made_not_even_to_be_left_out(few_variants, monkeypatch, capsys):
    made = []
    original = rows.Bench.variant
    monkeypatch.setattr(
        rows.Bench, "variant", lambda self, name, *a: made.append(name) or original(self, name, *a)
    )
    run("--no-full", "--no-peer", "--dropout", "0")
    assert "full is left out" in capsys.readouterr().out
    assert "lora" in made and "full" not in made


def test_part_of_the_rank_has_a_row_where_ranks_adapt():
    base = rows.load_base("tiny")
    common = rows.Bench(base=base, batch=rows.draw_batch(base, 3, 5), rank=4, dropout=0.1)
    found = rows.all_rows(
        common, ["adalora", "lora", "adalora_budget"], peers=False, active_fracs=[0.5, 0.1]
    )
    names = [row.name for row in found]
    assert {"adalora, rank 2 of 4", "adalora, rank 1 of 4"} < set(names)
    assert not any("rank" in name for name in names if not name.startswith("adalora, rank"))
    half = found[names.index("adalora, rank 2 of 4")]
    measure.timed(half, rows.FIRST_STEP)
    layers = [m for m in half.model.modules() if hasattr(m, "active_rank")]
    assert layers and {layer.active_rank() for layer in layers} == {2}
    for layer in layers:
        assert not layer.A[2:].any() and not layer.B[:, 2:].any()
    assert not half.allocates


def test_no_rank_changes_among_the_steps_that_are_timed():
    base = rows.load_base("tiny")
    common = rows.Bench(base=base, batch=rows.draw_batch(base, 2, 5), rank=3, dropout=0.0)
    row = common.variant("adalora")
    layers = [m for m in row.model.modules() if hasattr(m, "cuts")]
    with torch.no_grad():
        for layer in layers:
            layer.B.copy_(torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(0)))
    seconds = measure.measure([row], measure.MAX_ROUNDS)[row.name]
    measure.peak_bytes(row)
    assert len(seconds) == measure.MAX_ROUNDS and not any(int(layer.cuts) for layer in layers)
    assert measure.allocation_seconds(row, seconds) is not None
    assert all(int(layer.cuts) == 1 for layer in layers)


def test_without_peft_its_rows_are_left_out_and_that_is_said(capsys, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    run("--variant", "lora", "--dropout", "0")
    printed = capsys.readouterr().out
    assert 'peft is not installed, so its rows are left out: pip install -e ".[peers]"' in printed
    assert "peft LoRA" not in printed and "\nlora " in printed


@pytest.mark.parametrize("model", ["tiny", "tiny_llama"])
def test_the_floor_trains_nothing_and_every_other_row_trains(model):
    base = rows.load_base(model)
    start = copy.deepcopy(base.model.state_dict())
    common = rows.Bench(base=base, batch=rows.draw_batch(base, 3, 5), rank=3, dropout=0.1)
    found = rows.all_rows(common, ["lora", "qlora", "full"])
    measure.measure(found, 1)

    counts = {}
    for row in found:
        named = [(path, p) for path, p in row.model.named_parameters() if p.requires_grad]
        counts[row.name] = sum(p.numel() for _, p in named)
        assert all(p.grad is None for p in row.model.parameters())
        if row.floor is None:
            assert not named
            if row.name == rows.FLOOR:
                assert all(torch.equal(v, start[k]) for k, v in row.model.state_dict().items())
            continue
        if model == "tiny":
            [weight] = [p for path, p in named if re.search(r"classifier.*weight$", path)]
            assert not torch.equal(weight, start["classifier.weight"])
        if "lora" in row.name.lower():  # B started at zero
            factors = [p for path, p in named if re.search(r"\.B$|lora_B", path)]
            assert len(factors) == (13 if model == "tiny" else 14)
            assert all(p.any() for p in factors)
    # the same layers, and the head
    assert counts["lora"] == counts["peft LoRA"] == counts["qlora"]
    assert counts["qlora"] == counts["peft LoRA, bitsandbytes"]


def test_experts_are_measured_against_w_formed_and_what_peft_can_adapt():
    base = tiny.load(labels=None, seed=0, architecture="mixtral")
    common = rows.Bench(base=base, batch=rows.draw_batch(base, 3, 5), rank=2, dropout=0.1)
    found = rows.all_rows(common, ["lora", "dora", "qlora"], full=False)
    formed = [f"{name}, W' formed" for name in ("lora", "dora", "qlora")]
    names = [row.name for row in found if not row.name.startswith("floor")]
    assert set(names) == {
        "peft LoRA", "lora", "lora, dropout 0.1", "dora", "dora, dropout 0.1", "qlora",
        "qlora, dropout 0.1", *formed,
    }  # fmt: skip
    peers = {row.name: row.peer for row in found if row.peer}
    assert peers == {"lora": "peft LoRA", formed[0]: "peft LoRA"}
    counted = {
        row.name: sum(p.numel() for p in row.model.parameters() if p.requires_grad) for row in found
    }
    assert counted["peft LoRA"] == counted["lora"] == counted[formed[0]] > 0


def test_bitsandbytes_holds_the_bits_that_ours_holds():
    base = rows.load_base("tiny")
    common = rows.Bench(base=base, batch=rows.draw_batch(base, 3, 5), rank=3, dropout=0.0)
    ours = common.variant("qlora").model
    theirs = common.bitsandbytes_floor().model
    import bitsandbytes.functional as F

    quantized = [m for m in theirs.modules() if type(m).__name__ == "Linear4bit"]
    stores = [m.store for m in ours.modules() if hasattr(m, "store")]
    assert len(quantized) == len(stores) == 13
    for linear, store in zip(quantized, stores, strict=True):
        restored = F.dequantize_4bit(linear.weight, linear.weight.quant_state)
        assert torch.equal(restored, store.dequantize(torch.float32))


def test_memory_is_what_a_pass_makes_at_its_peak():
    """y = W x of (7, 50) floats with y's gradient, which is an expanded number."""
    linear = nn.Linear(30, 50, bias=False).requires_grad_(False)
    x = torch.randn(7, 30, requires_grad=True)

    def passes(number):
        linear(x).sum().backward()
        x.grad = None

    row = rows.Row(name="a", model=linear, passes=passes)
    # forward y and its sum; backward 1 and x's gradient, with y let go
    assert 4 * 7 * 50 < measure.peak_bytes(row) < 4 * (7 * 50 + 2 * 7 * 30) + 64


@pytest.mark.parametrize("n", range(1, 40))
def test_the_interval_encloses_the_median_in_95_of_100(n):
    found = timing.median_interval([float(i) for i in range(n)][::-1])
    assert found["median"] == (n - 1) / 2
    k = int(stats.binom.ppf(0.025, n, 0.5))  # P(X <= k - 1) <= 0.025
    if stats.binom.cdf(k, n, 0.5) <= 0.025:
        k += 1
    if k == 0:
        assert n < 6 and found["low"] is found["high"] is None
    else:
        assert (found["low"], found["high"]) == (k - 1, n - k)


def summary_of(ratio, low, over_peer=0.9, peak=0.9):
    def interval(median, low):
        return {"median": median, "low": low, "high": None if low is None else 2 * median - low}

    return {"name": "lora", "step_over_floor": interval(ratio, low), "peer": "peft LoRA",
            "step_over_peer": interval(over_peer, None), "peak_over_peer": peak}  # fmt: skip


@pytest.mark.parametrize(
    "row, sentences",
    [
        (summary_of(1.30, 1.05), []),  # missed by less than the noise
        (summary_of(1.05, 1.01), []),
        (summary_of(1.30, 1.11), ["lora takes 1.30 [1.11, 1.49] of its floor; target 1.1"]),
        (summary_of(1.11, None), ["lora takes 1.11 of its floor; target 1.1"]),
        (summary_of(1.0, None, over_peer=1.2), ["lora takes 1.20 of peft LoRA's time"]),
        (summary_of(1.0, None, peak=1.25), ["lora needs 1.2500 of peft LoRA's memory"]),
    ],
)
def test_a_target_is_missed_if_the_whole_interval_is(row, sentences):
    assert report.missed("minilm", [row]) == sentences


def test_check_ends_with_1_when_a_target_is_missed(monkeypatch, capsys):
    monkeypatch.setitem(report.TARGETS, "tiny", {"lora": 1e-9})
    with pytest.raises(SystemExit) as stopped:
        run("--variant", "lora", "--dropout", "0", "--no-peer", "--check")
    assert "missed:\nlora takes" in stopped.value.code
    monkeypatch.setitem(report.TARGETS, "tiny", {"lora": 1e9})
    run("--variant", "lora", "--dropout", "0", "--no-peer", "--check")


def test_targets_are_of_rows_that_exist():
    names = set(rows.variant_names())
    for model, targets in report.TARGETS.items():
        assert (rows.build.CONF / "model" / f"{model}.yaml").exists()
        assert {name.partition(",")[0] for name in targets} <= names


def test_the_figure_shows_every_row_but_its_floor(tmp_path):
    run("--variant", "dora", "--dropout", "0", "--plot", str(tmp_path / "bench.svg"))
    text = (tmp_path / "bench.svg").read_text()
    for name in ("peft DoRA", "dora", "every parameter", "tiny-bert, 3 x 5 tokens"):
        assert f">{name}" in text or name in text
    assert ">floor<" not in text


@pytest.mark.parametrize(
    "options, message",
    [
        (("--variant", "dorra"), "there is no variant=dorra; there are "),
        (("--model", "minlm"), "there is no model=minlm; there are hf, llama_7b, llama_blocks, "),
        (("--variant", "dora", "--rank", "37"), "rank is 37"),
        (("--rank", "0"), "--rank: 0 is not a whole number of at least 1"),
        (("--tokens", "3x301"), "tiny-bert takes at most 300 tokens; found 301"),
        (("--tokens", "32"), "--tokens: 32 is not <rows>x<tokens>, for example 32x32"),
        (("--tokens", "3xa"), "--tokens: 3xa is not <rows>x<tokens>, for example 32x32"),
        (("--dropout", "1"), "--dropout: 1 is not in [0, 1)"),
        (("--dropout", "x"), "--dropout: x is not in [0, 1)"),
        (("--rounds", "-1"), "--rounds: -1 is not a whole number of at least 1"),
        (
            ("--variants", "lora"),
            "unrecognized arguments: --variants lora. Did you mean --variant?",
        ),
        (("--rounds", "95"), "--rounds: 95 is more than 94"),
        (("--active-rank", "1"), "--active-rank: 1 is not in [0, 1)"),
        (("--check",), "there are no targets for tiny; there are for minilm, llama_blocks."),
        (("--variant", "head", "--json", "no/such/folder/x.json"), "no/such/folder"),
    ],
)
def test_a_mistake_is_one_sentence(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--no-peer", *options)
    code = stopped.value.code  # or a message, which Python prints and exits with 1
    text = capsys.readouterr().err.rstrip("\n") if code == 2 else code
    assert text.startswith("error: ") and message in text and "\n" not in text
