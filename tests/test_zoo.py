"""Every architecture of the zoo, through all that is done with a model: how much of it is adapted,
what it computes and learns, and who reads the result. An adapted model is the model of its W', in
value and gradient, whatever its code does with a layer's weight or output.

`python tests/test_zoo.py` walks through all and writes the table of docs/zoo.md.
"""

import copy
import functools
import re
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from adapters import config_of
from command import CommandLine
from transformers.utils import logging as transformers_logging

from harness.adapter import merged, peft_format
from harness.adapter.restore import restore
from harness.config import build
from harness.loop import show
from harness.memory.estimate import BatchShape, Estimator
from harness.models import passes, tiny
from harness.models.base import Outline

peft = pytest.importorskip("peft")
HF = {"_target_": "harness.models.hf.load", "_partial_": True, "dtype": "float32"}
VARIANTS = ("lora", "dora", "adalora", "qlora")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "zoo.md"


@functools.cache
def config(variant):
    return config_of(f"variant={variant}", "rank=4", "alpha=8", "partial=true")


class Specimen:
    """One architecture: its plain model, and copies that a variant is put into."""

    def __init__(self, name):
        self.entry = zoo.ZOO[name]
        self.plain = self.entry.model()
        backbone = self.plain.base_model_prefix
        classifies = "Classification" in self.entry.auto
        outside = [path for path, _ in self.plain.named_children() if path != backbone]
        self.head = [path for path in outside if classifies and self.has_weights(path)]
        self.passed = passes.through(self.plain, self.head)
        self.before = self.answer(self.plain)

    def has_weights(self, path):
        return any(True for _ in self.plain.get_submodule(path).parameters())

    @torch.no_grad()
    def answer(self, model):
        return zoo.output(model, self.entry)

    def adapted(self, variant):
        """A copy with every inner layer adapted, and all that is trained moved."""
        base = Outline(model=copy.deepcopy(self.plain), head=tuple(self.head), max_tokens=40)
        made, model = build.make_variant(config(variant)), base.model
        layers = build.adapt(base, made, config(variant), self.passed)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for layer in layers.values():
                for parameter in layer.roles().values():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return model, layers

    def dense(self, layers):
        """The plain model whose weights are W'."""
        model = copy.deepcopy(self.plain)
        with torch.no_grad():
            for layer in layers.values():
                site = layer.site
                site.matrix(model.get_parameter(site.parameter)).copy_(layer.adapted_weight())
        return model

    @torch.no_grad()
    def rounding(self, model):
        """The largest change of an answer when every weight moves by its own last digit."""
        moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(2)
        for parameter in moved.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter *= 1 + signs * torch.finfo(torch.float32).eps
        return float((self.answer(moved) - self.answer(model)).abs().max())

    def check_learns(self, variant):
        """One step's value and gradients, against autograd's through the dense W'."""
        model, layers = self.adapted(variant)
        answer = zoo.output(model, self.entry)
        answer.square().mean().backward()
        dense = self.dense(layers)
        atol = max(1e-5, 8 * self.rounding(dense))  # some models make much of a last digit
        expected = zoo.output(dense, self.entry)
        expected.square().mean().backward()
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=atol)
        assert (answer - self.before).abs().max() > 1e-3  # there was something to see
        for path, layer in layers.items():
            trained = [p for role, p in layer.roles().items() if role != "bias"]
            W = layer.definition(layer.base_weight())
            gradient = layer.site.matrix(dense.get_parameter(layer.site.parameter).grad)
            if layer.site.expert is not None and not gradient.any():  # no token has reached it
                assert not any(p.grad is not None and p.grad.any() for p in trained), path
                continue
            for parameter, reference in zip(
                trained, torch.autograd.grad(W, trained, gradient), strict=True
            ):
                scale = float(reference.abs().max())
                assert scale > 0, path
                torch.testing.assert_close(parameter.grad, reference, rtol=1e-3, atol=1e-3 * scale)

    def check_read(self, folder):
        """A merged folder by transformers alone, and the adapter by peft; why it is not, if so."""
        model, layers = self.adapted("lora")
        expected = self.answer(model)
        close = functools.partial(
            torch.testing.assert_close, rtol=1e-4,
            atol=max(1e-5, 8 * self.rounding(self.dense(layers))),
        )  # fmt: skip
        if not self.entry.not_peft:
            self.write_for_peft(folder / "peft", model, layers)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                theirs = peft.PeftModel.from_pretrained(copy.deepcopy(self.plain), folder / "peft")
            texts = [str(warning.message) for warning in caught]
            assert not [text for text in texts if "missing" in text or "unexpected" in text]
            close(self.answer(theirs.eval()), expected)
        else:
            with pytest.raises(peft_format.NotLowRank, match=self.entry.not_peft):
                self.write_for_peft(folder / "peft", model, layers)
        merged.merge_into_base(model, torch.float32).save_pretrained(folder / "merged")
        again, told = self.entry.auto_class.from_pretrained(
            folder / "merged", dtype=torch.float32, output_loading_info=True
        )
        assert not any(told.values())
        close(self.answer(again.eval()), expected)

    def write_for_peft(self, folder, model, layers):
        folder.mkdir()
        peft_format.write(folder, model=model, layers=layers, base="base", head=self.head,
                          config=config("lora"))  # fmt: skip

    def has_estimate(self, folder):
        """Tells if the memory of a step is estimated, with padding and without."""
        self.plain.config.save_pretrained(folder)
        labels = ["a", "b", "c"] if self.head else None
        of_run = {**config("lora"), "model": {**HF, "name": str(folder)}}
        estimator = Estimator(of_run, labels)
        try:
            return all(estimator.at(BatchShape(2, 6, padded=p)).total_bytes for p in (True, False))
        except ValueError as error:
            assert "cannot be estimated" in str(error)
            return False

    def coverage(self):
        model, layers = self.adapted("lora")
        return passes.coverage(self.passed, model, layers, chosen="all"), len(layers)


def row_of(name, folder):
    """Walks an architecture through and returns its row of the table."""
    specimen = Specimen(name)
    entry, (found, count) = specimen.entry, specimen.coverage()
    share = found["adapted"] / found["total"]
    assert share >= entry.least, show.coverage(found)
    for variant in VARIANTS:
        specimen.check_learns(variant)
    specimen.check_read(folder)
    largest = next(iter(found["left_out"]), "")
    kind = largest.split(".*.")[-1].removesuffix(".weight")
    run = entry.auto in ("ForCausalLM", "ForSequenceClassification")
    memory = ("no", "yes")[specimen.has_estimate(folder)] if run else ""
    held = f"no: {entry.not_peft.replace('.*', '...')}" if entry.not_peft else "yes"
    part = kind and f"`{kind}`"
    cells = (name, count, f"{share:.0%}", part, entry.left, held, memory)
    return f"| {' | '.join(map(str, cells))} |"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if entry.always else pytest.mark.long)
        for name, entry in zoo.ZOO.items()
    ],
)
def test_the_zoo(name, tmp_path):
    row = row_of(name, tmp_path)
    assert row in PAGE.read_text(encoding="utf-8").splitlines(), (
        f"docs/zoo.md does not hold this row; python tests/test_zoo.py writes it anew:\n{row}"
    )


@pytest.mark.parametrize("name", ["t5, classifier", "bart, classifier"])
def test_an_encoder_decoder_is_trained_to_classify(name, tmp_path, monkeypatch, capsys):
    tokenizer = tiny.byte_tokenizer("llama")
    tokenizer.add_eos_token = True  # whose state the classifier reads
    with monkeypatch.context() as patched:
        sizes = {"vocab_size": 272, "max_position_embeddings": 300}
        patched.setattr(zoo.architectures, "SIZES", {**zoo.architectures.SIZES, **sizes})
        zoo.ZOO[name].model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run = CommandLine(tmp_path, monkeypatch, capsys)
    assert run("model=hf", f"model.name={tmp_path / 'base'}", "variant=dora") == 0, run.err
    assert "(100 %)" in run.out
    found, made = run.result(), restore(run.folders()[0])
    assert found["status"] == "complete" and made.labels == ("bad", "good")
    assert list(made.layers) == list(found["active_rank"])


def test_the_example_of_the_page_runs_and_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["loss"] < 1.0  # ln 3 = 1.099 at the start
    model = transformers.ViTForImageClassification.from_pretrained("adapted-vit").eval()
    with torch.no_grad():
        found, expected = (m(names["pixels"]).logits for m in (model, names["model"].eval()))
    torch.testing.assert_close(found, expected)


def write_page():
    """Walks through all and writes their rows into docs/zoo.md."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    rows = []
    for name in zoo.ZOO:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                rows.append(row_of(name, Path(folder)))
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                if "-v" in sys.argv:
                    raise
    if len(rows) < len(zoo.ZOO):
        sys.exit(1)
    text = PAGE.read_text(encoding="utf-8")
    table = re.compile(r"(?<=\|---\|\n)(\|.*\n)*")
    PAGE.write_text(table.sub("".join(f"{row}\n" for row in rows), text, count=1), "utf-8")


if __name__ == "__main__":
    write_page()
