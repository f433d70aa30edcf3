"""python -m harness.adapter.export --merged: the folder in transformers, and the report."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adapters import NAMES, write_adapter, write_language_task
from command import write_task
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import variants
from harness.adapter import export as command
from harness.adapter import inference, merged
from harness.adapter.restore import restore
from harness.models import tiny
from variants.site import sites

TEXTS = ["a fine, warm film", "dull", "neither good nor bad, and longer"]  # below 40 tokens
# A BERT with every variant, and a Llama with some of them, which are merged in bfloat16 too: it is
# the same code for all.
ROUNDED = ("lora", "qdora", "full")
PAIRS = [*((name, "tiny") for name in NAMES), *((name, "tiny_llama") for name in ROUNDED)]
LOGITS_BF16 = 0.05  # of 1 or the largest logit: 8 bits, two layers, computed in bfloat16 too

# What somebody without this project does with the folders.
ELSEWHERE = """
import json, sys
sys.modules["harness"] = sys.modules["variants"] = None  # importing them fails
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
found = {}
texts, folders = json.loads(sys.argv[1]), sys.stdin.read().split()
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        logits = model.eval()(**inputs).logits
    found[folder] = {
        "logits": logits.float().tolist(),
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
        "class": type(model).__name__,
        "labels": [model.config.id2label[i] for i in range(logits.shape[1])],
    }
print(json.dumps(found))
"""


def logits_of(restored):
    limit = inference.token_limit(restored)
    return inference.classify(restored.model, restored.base.tokenizer, TEXTS, limit=limit)


def run(*arguments):
    """Exit code of `python -m harness.adapter.export`; 0 if it returns."""
    try:
        command.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    return 0


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("data"))


@pytest.fixture
def adapter(tmp_path, task):
    """overrides -> a run's folder with an adapter."""
    return lambda *overrides, **options: write_adapter(
        tmp_path / "run", *task, *overrides, **options
    )


@pytest.fixture(scope="module")
def merges(tmp_path_factory, task):
    """(variant, model) -> its run, its folders by dtype and what plain transformers finds there."""
    root = tmp_path_factory.mktemp("merges")
    made = {}
    for name, model in PAIRS:
        place = root / model / name
        path = write_adapter(place / "run", *task, f"variant={name}", f"model={model}")
        made[name, model] = SimpleNamespace(run=path, out={}, found={}, report={})
        for dtype in ("float32", "bf16") if name in ROUNDED else ("float32",):
            out = made[name, model].out[dtype] = place / f"out-{dtype}"
            made[name, model].report[dtype] = merged.export_merged(path, out, dtype=dtype)
    folders = [str(out) for each in made.values() for out in each.out.values()]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(TEXTS)],
        cwd=root, input="\n".join(folders), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for each in made.values():
        each.found = {dtype: found[str(out)] for dtype, out in each.out.items()}
    return made


# ---- the folder ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "model"), PAIRS)
def test_the_folder_is_the_model_in_plain_transformers(name, model, merges):
    made = merges[name, model]
    restored = restore(made.run, dense=True)
    expected = logits_of(restored)
    scale = max(1.0, float(expected.abs().max()))
    bounds = {"float32": 1e-5, "bf16": LOGITS_BF16}
    dtypes = {"float32": ["torch.float32"], "bf16": ["torch.bfloat16"]}
    for dtype, found in made.found.items():
        difference = (torch.tensor(found["logits"]) - expected).abs().max()
        assert difference <= bounds[dtype] * scale, (dtype, difference)
        assert found["labels"] == list(restored.labels) == ["bad", "good"]
        assert found["class"] == type(restored.model).__name__
        assert found["dtypes"] == dtypes[dtype]
    # The adapter matters, so that a folder of the base alone would have been found out.
    untrained = tiny.load(labels=restored.labels, seed=0, architecture=model[5:] or "bert")
    plain = inference.classify(untrained.model, untrained.tokenizer, TEXTS, limit=None)
    assert (plain - expected).abs().max() > 0.02


def test_a_folder_holds_no_trace_of_this_project(merges):
    for (name, _), made in merges.items():
        for out in made.out.values():
            files = {path.name: path.read_bytes() for path in out.iterdir()}
            assert set(files) == {
                "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
            }  # fmt: skip
            for trace in ("harness", "variants", str(made.run.parent), "tiny-"):
                assert not [file for file, content in files.items() if trace.encode() in content]
            assert name.encode() not in files["config.json"] or name in ("full", "head")
            expected = "float32" if out.name.endswith("float32") else "bfloat16"
            assert json.loads(files["config.json"])["dtype"] == expected


@pytest.mark.parametrize(
    "options",
    [["variant=dora"], ["variant=full"], ["targets=[lm_head]"], ["targets=[embed_tokens]"]],
    ids=str,
)
def test_a_language_model_is_merged_as_one(options, tmp_path):
    """The last two adapt one side of a pair that is tied."""
    run_path = write_adapter(tmp_path / "run", *write_language_task(tmp_path), *options)
    report = merged.export_merged(run_path, tmp_path / "out", dtype="float32")
    assert report["divergence"][-1]["kl_max_nats"] < 1e-6 and report["texts"].startswith("6 ")
    restored = restore(run_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([restored.base.tokenizer(TEXTS[2])["input_ids"]])
    with torch.no_grad():
        expected, found = (each(ids).logits for each in (restored.model, model.eval()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert model.config.tie_word_embeddings is (options[0].startswith("variant"))
    plain = tiny.load(labels=None, seed=0, architecture="llama").model
    with torch.no_grad():
        assert (plain(ids).logits - expected).abs().max() > 0.02


def test_the_dtype_is_the_bases_if_none_is_asked_for(adapter, tmp_path):
    run_path = adapter("model.dtype=bfloat16")
    merged.export_merged(run_path, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_merged_model_has_no_layer_or_hook_of_ours(adapter):
    restored = restore(adapter())
    expected = logits_of(restored)
    model = merged.merge_into_base(restored.base.model, torch.float32)
    assert not [part for part in model.modules() if type(part).__module__.startswith("variants")]
    assert not [part for part in model.modules() if part._forward_pre_hooks]
    torch.testing.assert_close(logits_of(restored), expected, rtol=0, atol=1e-5)


def test_a_value_that_a_dtype_cannot_hold_is_named(adapter, tmp_path):
    run_path = adapter(size=1e4)
    with pytest.raises(ValueError, match=r"has an entry of \S+, which float16 cannot hold\."):
        merged.export_merged(run_path, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_model_that_overflows_is_a_warning(adapter, tmp_path, capsys):
    run_path = adapter("variant=head", size=2e4)  # below 65504, but not the sums
    assert run(run_path, "--merged", tmp_path / "out", "--dtype", "fp16") == 0
    assert "are not finite: its activations overflow float16." in capsys.readouterr().out
    report = json.loads((tmp_path / "out.merge_report.json").read_text())
    assert report["divergence"][-1]["kl_max_nats"] is None


# ---- the report, against float64 ----------------------------------------------------------------


def bf16(x):
    """Round float64 to bfloat16, ties to even, by the bits of float32."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def cos(a, b):
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def test_layer_rows_are_those_of_float64(adapter, tmp_path):
    run_path = adapter("variant=lora", "rank=3", "alpha=6", size=0.03)
    report = merged.export_merged(run_path, tmp_path / "out", dtype="bf16")
    state = load_file(run_path / "adapter/native.safetensors")
    base = tiny.load(labels=("bad", "good"), seed=0).model.state_dict()
    saved = load_file(tmp_path / "out/model.safetensors")
    assert len(report["layers"]) == 13
    for row in report["layers"]:
        W, A, B = (
            tensor.double().numpy()
            for tensor in (base[f"{row['layer']}.weight"], *(state[f"{row['layer']}.{r}"]
                                                             for r in "AB"))
        )  # fmt: skip
        update = 2.0 * B @ A
        recovered = bf16(W + update) - bf16(W)
        norm = np.linalg.norm(update) / np.linalg.norm(W)
        assert row["relative_norm"] == pytest.approx(norm, rel=1e-4)
        assert row["cos"] == pytest.approx(cos(update, recovered), abs=1e-4)
        written = saved[f"{row['layer']}.weight"].double().numpy()
        assert np.mean(written != bf16(W + update)) < 1e-2  # W' itself is float32
    assert report["lowest"] == sorted(
        (row["layer"] for row in report["layers"] if row["cos"] < 0.9),
        key={row["layer"]: row["cos"] for row in report["layers"]}.get,
    )


def test_divergence_is_that_of_float64():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(50, 4, generator=generator) for _ in range(2))
    found = merged.divergence(p, q)

    def log_softmax(x):
        x = x.double().numpy()
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    a, b = log_softmax(p), log_softmax(q)
    kl = (np.exp(a) * (a - b)).sum(1)
    assert found["kl_mean_nats"] == pytest.approx(kl.mean(), rel=1e-9)
    assert found["kl_max_nats"] == pytest.approx(kl.max(), rel=1e-9)
    assert found["changed_predictions_frac"] == np.mean(a.argmax(1) != b.argmax(1))
    assert found["n"] == 50
    assert merged.divergence(p, p)["kl_max_nats"] == 0.0


class Sum(variants.AdapterLinear):
    """W + a given update."""

    def __init__(self, store, update):
        super().__init__(store, None, path="layer", seed=0)
        self.update = update

    def definition(self, W):
        return W + self.update


@pytest.mark.parametrize(
    ("rounding", "relative", "expected", "within"),
    [
        # A base that is stored as the merge will be; what of the update survives.
        (merged.rounding(torch.bfloat16), 1e-3, 0.56, 0.05),
        (merged.rounding(torch.bfloat16), 1e-2, 0.985, 0.01),
        (merged.rounding(torch.bfloat16), 3e-2, 0.998, 0.002),
        (merged.rounding(torch.float32, variants.Nf4Store), 0.03, 0.12, 0.06),
        (merged.rounding(torch.float32, variants.Nf4Store), 0.10, 0.76, 0.03),
        (merged.rounding(torch.float32), 1e-3, 1.0, 1e-4),
    ],
)
def test_what_rounding_leaves_of_an_update(rounding, relative, expected, within):
    generator = torch.Generator().manual_seed(0)
    W = (2 * torch.rand(512, 512, generator=generator) - 1) / 512**0.5
    W = rounding(W).float()
    update = torch.randn(512, 8, generator=generator) @ torch.randn(8, 512, generator=generator)
    update *= relative * W.norm() / update.norm()
    base = nn.ModuleDict({"layer": nn.Linear(512, 512, bias=False)})
    base["layer"].weight.data = W
    layer = Sum(variants.DenseStore(W), update)
    layer.site = sites(base)["layer"]
    [row] = merged.layer_rows(base, {"layer": layer}, rounding)
    assert row["relative_norm"] == pytest.approx(relative, rel=1e-3)
    assert row["cos"] == pytest.approx(expected, abs=within)


def test_an_update_that_is_lost_is_a_warning(adapter, tmp_path, capsys):
    run_path = adapter("variant=lora", size=0.001)
    assert run(run_path, "--merged", tmp_path / "out", "--dtype", "bf16") == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out.merge_report.json").read_text())
    low = [row for row in report["layers"] if row["cos"] < 0.9]
    assert low and len(report["lowest"]) == len(low)
    assert f"warning: rounding to bfloat16 eats the update of {len(low)} of 13 layers" in printed
    assert min(low, key=lambda row: row["cos"])["layer"] == report["lowest"][0]
    assert report["lowest"][0] in printed

    assert run(run_path, "--merged", tmp_path / "exact", "--dtype", "float32") == 0
    assert "warning" not in capsys.readouterr().out


def test_layers_that_were_not_trained_have_no_cosine(adapter, tmp_path):
    report = merged.export_merged(adapter("variant=head"), tmp_path / "out", dtype="bf16")
    assert {row["cos"] for row in report["layers"]} == {None}
    assert {row["relative_norm"] for row in report["layers"]} == {0.0}
    assert report["lowest"] == [] and "warning" not in merged.report_text(report)


def test_layers_of_a_stack_share_a_line(merges):
    text = merged.report_text(merges["full", "tiny"].report["float32"])
    [line] = [line for line in text.splitlines() if "attention.self.query" in line]
    assert line.split()[:2] == ["bert.encoder.layer.*.attention.self.query", "2"]
    assert float(line.split()[4]) == pytest.approx(1.0, abs=1e-4)  # dW of what has no store


# ---- a base in 4 bits ---------------------------------------------------------------------------


def test_a_4_bit_base_is_merged_into_the_original_weights_and_the_gap_is_told(adapter, tmp_path):
    run_path = adapter("variant=qlora")
    report = merged.export_merged(run_path, tmp_path / "out", dtype="float32")
    assert any("merged into the original weights of tiny-bert" in note for note in report["notes"])
    gap, rounded, total = report["divergence"]
    assert (gap["from"], gap["to"]) == ("as trained", "on the original weights")
    assert (rounded["from"], rounded["to"]) == ("on the original weights", "as saved")
    assert (total["from"], total["to"]) == ("as trained", "as saved")
    assert gap["kl_mean_nats"] > 1e-5 > 1e-9 > rounded["kl_mean_nats"]
    assert gap["n"] == 12 and report["texts"] == "12 validation rows of local"

    trained, dense = restore(run_path), restore(run_path, dense=True)
    texts, _ = inference.sample_texts(trained, 64)
    p, q = (
        inference.classify(each.model, each.base.tokenizer, texts, limit=40)
        for each in (trained, dense)
    )
    assert gap["kl_mean_nats"] == merged.divergence(p, q)["kl_mean_nats"]
    for row in report["layers"]:
        weight = load_file(tmp_path / "out/model.safetensors")[f"{row['layer']}.weight"]
        assert torch.equal(weight, dense.layers[row["layer"]].adapted_weight())


def test_requantising_is_a_separate_act(adapter, tmp_path, capsys):
    run_path = adapter("variant=qlora")
    out = tmp_path / "out"
    assert run(run_path, "--merged", out, "--dtype", "float32", "--requantize", "nf4") == 0
    printed = capsys.readouterr().out
    assert "13 adapted layers were rounded to nf4 and are saved dense" in printed
    report = json.loads((tmp_path / "out.merge_report.json").read_text())
    assert (report["requantized"], report["rounding"]) == ("nf4", "nf4 and float32")
    saved = load_file(out / "model.safetensors")
    dense = restore(run_path, dense=True)
    for path, layer in dense.layers.items():
        expected = variants.Nf4Store(layer.adapted_weight()).dequantize(torch.float32)
        assert torch.equal(saved[f"{path}.weight"], expected)
    embedding = dense.model.get_input_embeddings().weight
    assert torch.equal(saved["bert.embeddings.word_embeddings.weight"], embedding)


def test_a_task_whose_data_is_gone_is_replaced_by_sentences(tmp_path):
    files = write_task(tmp_path)
    run_path = write_adapter(tmp_path / "run", *files)
    (tmp_path / "validation.csv").unlink()
    report = merged.export_merged(run_path, tmp_path / "out")
    assert report["texts"] == "8 built-in sentences" and report["divergence"][0]["n"] == 8


# ---- what stands there already, another base, the command line ----------------------------------


def test_only_an_earlier_merge_is_replaced_and_only_if_asked_for(adapter, tmp_path, capsys):
    run_path, out = adapter(), tmp_path / "out"
    out.mkdir()  # an empty folder is free
    assert run(run_path, "--merged", out) == 0
    assert run(run_path, "--merged", out) == 1
    assert "holds an earlier merge; --replace writes it anew." in capsys.readouterr().err
    (out / "left_over").touch()
    assert run(run_path, "--merged", out, "--force") == 1  # that is about the base
    assert run(run_path, "--merged", out, "--replace") == 0
    assert not (out / "left_over").exists()

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("x")
    assert run(run_path, "--merged", theirs, "--replace") == 1
    assert "is not empty and holds no merge of ours" in capsys.readouterr().err
    assert (theirs / "thesis.tex").read_text() == "x"
    assert run(run_path, "--merged", theirs / "thesis.tex") == 1
    assert "which is a file; give a folder." in capsys.readouterr().err
    assert run(run_path, "--merged", run_path, "--replace") == 1
    assert (run_path / "adapter/native.json").is_file()


def test_another_base_is_refused_unless_forced(adapter, tmp_path, capsys):
    base = tiny.load(labels=("bad", "good"), seed=0)
    folder = tmp_path / "base"
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    run_path = adapter("model=hf", f"model.name={folder}")
    assert run(run_path, "--merged", tmp_path / "same") == 0
    assert str(folder) not in (tmp_path / "same/config.json").read_text()

    tensors = load_file(folder / "model.safetensors")
    tensors["bert.embeddings.word_embeddings.weight"] += 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert run(run_path, "--merged", tmp_path / "other") == 1
    assert "the base of" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert run(run_path, "--merged", tmp_path / "same", "--replace") == 1
    assert "the base of" in capsys.readouterr().err  # replacing does not take another base
    assert run(run_path, "--merged", tmp_path / "other", "--force") == 0
    assert "Forced: the base of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "nothing to do: give --merged OUT"),
        (("--merge", "out"), 2, "unrecognized arguments: --merge out. Did you mean --merged?"),
        (("--dtype", "bf16"), 2, "--dtype belongs to --merged"),
        (("--requantize", "nf4"), 2, "--requantize belongs to --merged"),
        (("--merged", "out", "--dtype", "bf61"), 1, "Did you mean bf16?"),
        (("--merged", "out", "--requantize", "nf8"), 1, "Did you mean nf4?"),
    ],
)
def test_mistakes_of_the_command_line(options, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/native.json").touch()
    assert run(tmp_path / "run", *options) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_an_adapter(tmp_path, capsys):
    assert run(tmp_path, "--merged", tmp_path / "out") == 1
    assert "holds no adapter" in capsys.readouterr().err
