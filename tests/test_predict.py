"""Using an adapter: harness.adapter.evaluate and harness.adapter.predict, with its benchmark, of
which no test asserts a time."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from adapters import write_adapter, write_language_task
from command import CommandLine, write_task
from templates import save_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    FNetConfig,
    FNetForSequenceClassification,
)

from harness.adapter import evaluate, inference, predict, serving
from harness.adapter import export as export
from harness.adapter.restore import restore
from harness.models import hf, tiny
from harness.tasks.classification import TextClassification

TEXTS = ["a fine, warm film", "dull", "neither good nor bad, and longer"]  # below 40 tokens


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def call(capsys):
    """(module, arguments) -> exit code, printed, complained."""

    def called(module, *arguments):
        code = 0
        try:
            module.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        if isinstance(code, str):
            return 1, out, err + code
        return code, out, err

    return called


@pytest.fixture
def adapter(tmp_path):
    """overrides -> a run's folder with an adapter; its data are in tmp_path / "data"."""
    data = tmp_path / "data"
    data.mkdir()
    task = write_task(data)
    return lambda *overrides: write_adapter(tmp_path / "run", *task, *overrides)


def answers(printed):
    return [json.loads(line) for line in printed.splitlines()]


# ---- evaluate -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ("variant=dora",),
        ("variant=qlora", "model=tiny_llama", "train.eval_batch_size=5"),
        ("variant=adalora_budget", "dropout=0.1"),
        ("variant=full", "model.dtype=bfloat16", "train.compute_dtype=bfloat16"),
    ],
    ids=lambda overrides: overrides[0].partition("=")[2],
)
def test_evaluation_reproduces_the_stored_result(overrides, tmp_path, monkeypatch, capsys, call):
    train = CommandLine(tmp_path, monkeypatch, capsys)
    assert train(*overrides) == 0, train.err
    [folder] = train.folders()
    stored = answers((folder / "predictions.jsonl").read_text())
    for split in ("validation", "test"):
        out = tmp_path / f"{split}.jsonl"
        code, printed, _ = call(evaluate, folder, "--split", split, "--out", out)
        assert code == 0 and printed.endswith("equal to the stored result\n")
        found = dict(re.findall(r"^(\w+) +([\d.e-]+)$", printed, re.MULTILINE))
        assert {k: float(v) for k, v in found.items()} == train.result(folder)[split]
        assert answers(out.read_text()) == [row for row in stored if row["split"] == split]

    # The adapter's folder is enough, wherever it is.
    alone = shutil.copytree(folder / "adapter", tmp_path / "alone" / "mine")
    shutil.rmtree(folder)
    code, again, _ = call(evaluate, alone)
    assert code == 0 and again.endswith("there is no stored result to compare with\n")
    assert again.splitlines()[:-1] == printed.splitlines()[:-1]


def test_numbered_classes_keep_their_names_wherever_they_are_restored(
    tmp_path, monkeypatch, capsys, call
):
    """Twelve of them: as text, 10 comes before 2, and so does the key of the tenth."""
    names = [str(number) for number in range(1, 13)]
    task = ["task=local"]
    for split in ("train", "validation", "test"):
        path = tmp_path / f"{split}.jsonl"
        rows = [{"text": f"{split} {10 * 'ab'[n % 2]} {n}", "label": n} for n in range(12, 0, -1)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
        task.append(f"task.files.{split}={path}")
    train = CommandLine(tmp_path, monkeypatch, capsys)
    assert train(*task, "train.steps=2") == 0, train.err
    [run] = train.folders()
    stored = {row["row"]: row for row in answers((run / "predictions.jsonl").read_text())}
    assert {row["label"] for row in stored.values()} == {*names}
    assert call(evaluate, run)[0] == 0  # the stored result to the bit
    restored = restore(run)
    assert restored.labels == tuple(names)

    texts = inference.recorded_task(restored.config).texts("test")
    logits = inference.classify(restored.model, restored.base.tokenizer, texts[:12], limit=64)
    expected = [names[i] for i in logits.argmax(-1)]
    code, printed, _ = call(predict, run, *(x for text in texts[:12] for x in ("--text", text)))
    assert code == 0 and [row["label"] for row in answers(printed)] == expected
    assert all(list(row["probabilities"]) == names for row in answers(printed))

    out = tmp_path / "merged"
    assert call(export, run, "--merged", out)[0] == 0
    plain = AutoModelForSequenceClassification.from_pretrained(out)
    assert [plain.config.id2label[i] for i in range(12)] == names
    # A folder that has been learned for the same labels, and a run that goes on: nothing is drawn.
    again = hf.load(labels=names, seed=3, name=str(out))
    assert "the same labels" in again.notes[0]
    assert torch.equal(again.model.classifier.weight, restored.base.model.classifier.weight)
    assert train(*task, "train.steps=2", f"init_from={run}", "seed=1") == 0, train.err
    assert "with all that it had trained" in train.out


@pytest.mark.parametrize("read_as", ["text", "tokens"])
def test_a_classifier_reads_control_tokens_as_its_run_did(read_as, adapter, call):
    run, text = adapter(f"task.control_tokens={read_as}"), "a[SEP]fine film[CLS]"
    code, printed, _ = call(predict, run, "--text", text)
    restored = restore(run)
    inputs = restored.base.tokenizer(
        [text], split_special_tokens=read_as == "text", return_tensors="pt"
    )
    with torch.no_grad():
        expected = restored.model(**inputs).logits[0].double().softmax(-1)
    [row] = answers(printed)
    assert code == 0 and list(row["probabilities"].values()) == pytest.approx(expected.tolist())


def test_another_result_is_told_and_fails(adapter, call):
    run = adapter()
    metrics = evaluate.evaluate(restore(run), "test").metrics
    stored = {**metrics, "loss_nats": math.nextafter(metrics["loss_nats"], 9.0)}
    result = {
        "status": "complete", "variant": "lora", "seed": 0, "lr": 1e-3, "run_key": "k", "steps": 3,
        "control_hash": "c", "fingerprints": {"data": "d"}, "test": stored, "validation": metrics,
        "parameters": {"trainable": 2, "trainable_final": 2},
        "time": {"train_s": 1.0, "step_median_s": 0.3, "tokens_per_s": 9.0},
        "memory": {"train_peak_bytes": 9, "base_bytes": 3},
    }  # fmt: skip
    (run / "result.json").write_text(json.dumps(result))
    code, printed, complained = call(evaluate, run)
    assert code == 1 and f"loss_nats   {metrics['loss_nats']}" in printed
    assert complained == (
        f"error: not the stored result: loss_nats is {metrics['loss_nats']}, "
        f"stored {stored['loss_nats']}."
    )
    (run / "result.json").unlink()
    code, printed, _ = call(evaluate, run, "--split", "validation")
    assert code == 0 and "there is no stored result" in printed


def test_batches_and_threads_are_those_of_the_run(adapter, monkeypatch):
    seen = []
    measured = TextClassification.evaluate

    def spy(self, model, split, *, batch_size, device):
        seen.append((split, batch_size, str(device), torch.get_num_threads()))
        return measured(self, model, split, batch_size=batch_size, device=device)

    monkeypatch.setattr(TextClassification, "evaluate", spy)
    run = adapter("train.eval_batch_size=5", "train.threads=2")
    torch.set_num_threads(1)
    evaluate.evaluate(restore(run), "test")
    assert seen == [("test", 5, "cpu", 2)]


def test_other_data_is_refused(adapter, tmp_path, call):
    run = adapter()
    with (tmp_path / "data/test.csv").open("a") as file:
        file.write("one more,good\n")
    code, _, complained = call(evaluate, run)
    assert code == 1 and "the data of local differs from what the adapter was" in complained
    (tmp_path / "data/test.csv").unlink()
    code, _, complained = call(evaluate, run)
    assert code == 1 and "test.csv" in complained and "cannot be read" in complained


def test_a_task_that_is_not_ours_is_not_run():
    task = {"_target_": "subprocess.run", "args": ["true"]}
    with pytest.raises(ValueError, match=r"task asks for 'subprocess\.run'"):
        inference.recorded_task({"task": task})
    with pytest.raises(ValueError, match="does not say which task"):
        inference.recorded_task({})


def test_mistakes_of_evaluate(adapter, tmp_path, call):
    run = adapter()
    assert call(evaluate, run, "--split", "train")[0] == 2
    code, _, complained = call(evaluate, run, "--out", tmp_path / "no/where.jsonl")
    assert code == 1 and "there is no folder" in complained
    code, printed, complained = call(evaluate, run, "--out", tmp_path)
    assert code == 1 and "which is a folder; give a file." in complained and not printed
    code, _, complained = call(evaluate, tmp_path / "nothing")
    assert code == 1 and "is no folder" in complained


@pytest.mark.parametrize(
    "words",
    ["adapter.predict run --text x", "adapter.evaluate run", "adapter.export run --merged out",
     "adapter.export run --peft out", "inspect run", "adapter.predict --help",
     "adapter.export --help"],
)  # fmt: skip
def test_a_mistake_is_told_before_torch_is_imported(words, tmp_path):
    """Seconds, on a slow disk."""
    name, *arguments = words.split()
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)\n"
        "finally: assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'too late'"
    )
    command = [sys.executable, "-c", code, f"harness.{name}", *arguments]
    root = str(Path(predict.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if "--help" in arguments:
        assert done.returncode == 0 and f"usage: python -m harness.{name}" in done.stdout
    else:
        assert done.returncode == 1 and done.stderr.startswith("error: ")
        assert "run is no folder; give a run's folder" in done.stderr


# ---- predict ------------------------------------------------------------------------------------


def test_answers_are_those_of_the_model_in_the_order_of_the_texts(adapter, call):
    run = adapter("variant=dora")
    options = [option for text in TEXTS for option in ("--text", text)]
    code, printed, _ = call(predict, run, *options, "--batch-size", 2)
    assert code == 0
    found = answers(printed)
    assert [answer["text"] for answer in found] == TEXTS
    restored = restore(run)
    for answer in found:
        inputs = restored.base.tokenizer([answer["text"]], return_tensors="pt")
        with torch.no_grad():
            expected = restored.model(**inputs).logits[0].softmax(-1)
        assert list(answer) == ["text", "label", "probabilities"]
        assert list(answer["probabilities"]) == ["bad", "good"]
        assert list(answer["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert answer["label"] == ("bad", "good")[int(expected.argmax())]
        assert sum(answer["probabilities"].values()) == pytest.approx(1.0)


def test_predictions_are_those_of_the_evaluation(adapter, tmp_path, call):
    run = adapter()
    restored = restore(run)
    expected = evaluate.evaluate(restored, "test").predictions
    texts = inference.recorded_task(restored.config).texts("test")
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    found = answers(call(predict, run, "--file", file)[1])
    assert len(found) == len(expected) == 14
    for answer, row, text in zip(found, expected, texts, strict=True):
        assert (answer["text"], answer["label"]) == (text, row["prediction"])
        nats = -math.log(answer["probabilities"][row["label"]])
        assert nats == pytest.approx(row["loss_nats"], abs=1e-5)


@pytest.mark.parametrize("variant", ["qdora", "adalora_budget", "full"])
def test_merging_first_changes_no_answer(variant, adapter, call):
    run = adapter(f"variant={variant}")
    plain, merged = (
        answers(call(predict, run, "--text", TEXTS[0], *options)[1])
        for options in ((), ("--merged",))
    )
    values = [list(found[0]["probabilities"].values()) for found in (plain, merged)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_merged_is_merged(adapter, call, monkeypatch):
    merged = []
    from harness.adapter.answers import classifications

    def spy(restored, *arguments):
        merged.append({layer.merged_weight is not None for layer in restored.layers.values()})
        return classifications(restored, *arguments)

    monkeypatch.setattr("harness.adapter.answers.classifications", spy)
    run = adapter()
    call(predict, run, "--text", "x", "--merged")
    call(predict, run, "--text", "x")
    assert merged == [{True}, {False}]


def test_texts_are_cut_where_the_run_cut_its_own(adapter, call):
    run = adapter()  # 40 tokens: two special ones and 38 bytes
    short, long, cut = ("x" * n for n in (37, 90, 38))
    found = answers(call(predict, run, "--text", short, "--text", long, "--text", cut)[1])
    other, *same = ([*answer["probabilities"].values()] for answer in found)
    assert same[0] == pytest.approx(same[1], abs=1e-6)  # rows of a batch differ by rounding
    assert same[0] != pytest.approx(other, abs=1e-5)
    assert found[1]["text"] == long


def test_a_language_model_answers_with_text(tmp_path, call):
    """Greedily, from the prompt as the run wrote it, whatever stands beside it in the batch."""
    run = write_adapter(tmp_path / "run", *write_language_task(tmp_path), "variant=dora")
    texts = ["1 + 1", "a much longer question", "7"]
    options = [option for text in texts for option in ("--text", text)]
    code, printed, _ = call(predict, run, *options)
    found = answers(printed)
    assert code == 0 and [answer["text"] for answer in found] == texts
    restored = restore(run)
    tokenizer, model = restored.base.tokenizer, restored.model
    for answer in found:
        ids = [tokenizer.bos_token_id]
        ids += tokenizer(answer["text"] + "\n", add_special_tokens=False)["input_ids"]
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 6 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer["answer"] == tokenizer.decode(ids[start:], skip_special_tokens=True)

    code, _, complained = call(predict, run, "--text", "x" * 3000)
    assert code == 1 and "leaves no room for an answer: the model reads" in complained


def test_the_result_of_a_language_model_is_reproduced(tmp_path, monkeypatch, capsys, call):
    train = CommandLine(tmp_path, monkeypatch, capsys)
    assert train(*write_language_task(tmp_path), "task.generate_rows=3") == 0, train.err
    [folder] = train.folders()
    code, printed, complained = call(evaluate, folder)
    assert code == 0 and printed.endswith("equal to the stored result\n"), complained
    assert "perplexity" in printed and "exact_match" in printed


@pytest.mark.parametrize("kind", ["llama3", "chatml_bos", "zephyr_always", "text"])
def test_a_chat_is_served_elsewhere_as_here(kind, tmp_path, call):
    """A run's answers, and those of plain transformers with its exported folder: the same prompt,
    the same date in it, the same end."""
    settings = {"use_cache": kind != "text"}
    name = save_model(tmp_path / "base", kind, **settings)
    run = write_adapter(
        tmp_path / "run", *write_language_task(tmp_path), "model=hf", f"model.name={name}",
        size=0.3,
    )  # fmt: skip
    texts = ["1 + 1", "yes </s>no<|im_end|>", "is it?"]
    options = [option for text in texts for option in ("--text", text)]
    code, printed, complained = call(predict, run, *options)
    assert code == 0, complained
    out = tmp_path / "merged"
    assert call(export, run, "--merged", out)[0] == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    shown = {"date_string": "26 Jul 2024"} if kind == "llama3" else {}
    for text, answer in zip(texts, answers(printed), strict=True):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True,
            return_tensors="pt", sanitize_control_tokens=True, **shown,
        )  # fmt: skip
        made = model.generate(**inputs, do_sample=False, max_new_tokens=6, tokenizer=tokenizer)
        ids = made[0, inputs["input_ids"].shape[1] :]
        said = tokenizer.decode(ids, skip_special_tokens=True)
        assert answer["answer"] == said.partition("\n### End")[0]
    config = json.loads((out / "config.json").read_text())
    assert config["use_cache"] is settings["use_cache"]  # as the base has it
    generation = json.loads((out / "generation_config.json").read_text())
    end = {"llama3": "<|eot_id|>", "chatml_bos": "<|im_end|>"}.get(kind, "</s>")
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
    found = generation["eos_token_id"]
    assert {*(found if isinstance(found, list) else [found])} == ends
    assert generation.get("stop_strings") == (["\n### End"] if kind == "text" else None)


def test_a_date_is_the_same_in_a_run_and_in_predict(tmp_path, monkeypatch, capsys, call):
    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    name = save_model(tmp_path / "base", "llama3")
    train = CommandLine(tmp_path, monkeypatch, capsys)
    common = [*write_language_task(tmp_path), "model=hf", f"model.name={name}", "train.steps=1"]
    common.append("task.max_tokens=200")
    assert train(*common) == 0, train.err
    [folder] = train.folders()
    first = train.result(folder)
    seen = []
    monkeypatch.setattr("harness.adapter.answers.language.prompt_tokens", spy(seen))
    with monkeypatch.context() as clock:
        clock.setattr("transformers.utils.chat_template_utils.datetime", Later)
        monkeypatch.setenv("LORA_VARIANTS_CACHE", str(tmp_path / "cache"))  # tokenised anew
        assert train(*common, "force=true") == 0, train.err
        assert train.result(folder)["validation"] == first["validation"]
        assert call(evaluate, folder)[0] == 0
        assert call(predict, folder, "--text", "x")[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(name)
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(seen[0])
    assert train(*common, "task.date=2025-01-31") == 0, train.err
    (other,) = [path for path in train.folders() if path != folder]
    result = train.result(other)
    for key in ("run_key", "control_hash"):
        assert result[key] != first[key]
    assert result["fingerprints"]["data"] != first["fingerprints"]["data"]
    assert result["validation"]["loss_nats"] != first["validation"]["loss_nats"]
    assert call(predict, other, "--text", "x")[0] == 0
    assert "Today Date: 31 Jan 2025" in tokenizer.decode(seen[1])


def spy(seen):
    from harness.tasks.language import prompt_tokens

    def told(text, writer):
        seen.append(prompt_tokens(text, writer))
        return seen[-1]

    return told


def test_a_model_without_attention_masks_answers(tmp_path, adapter, call):
    tokenizer = tiny.byte_tokenizer("bert")
    tokenizer.model_input_names = ["input_ids", "token_type_ids"]
    tokenizer.save_pretrained(tmp_path / "fnet")
    config = FNetConfig(
        vocab_size=259, hidden_size=36, num_hidden_layers=2, intermediate_size=53, pad_token_id=0
    )
    FNetForSequenceClassification(config).save_pretrained(tmp_path / "fnet")
    run = adapter("model=hf", f"model.name={tmp_path / 'fnet'}")
    options = [option for text in TEXTS for option in ("--text", text)]
    code, printed, complained = call(predict, run, *options)
    assert code == 0 and len(answers(printed)) == 3, complained
    assert call(predict, run, "--benchmark", "--rounds", 1)[0] == 0


def standard_input(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_files_and_standard_input_hold_a_text_a_line(adapter, tmp_path, call, monkeypatch):
    run = adapter()
    content = "\ufefffirst ü\r\n\n  \nsecond\n{}".encode()
    file = tmp_path / "texts.txt"
    file.write_bytes(content)
    _, from_file, _ = call(predict, run, "--file", file)
    assert [answer["text"] for answer in answers(from_file)] == ["first ü", "second", "{}"]
    standard_input(monkeypatch, content)
    assert call(predict, run)[1] == from_file
    table = tmp_path / "texts.csv"
    table.write_text("label,text\n,first ü\nbad,second\ngood,{}\n", encoding="utf-8")
    assert call(predict, run, "--file", table)[1] == from_file


def test_answers_come_before_the_next_text_is_read(adapter, call, monkeypatch, capsys):
    run = adapter()
    seen = []

    class Slow(io.RawIOBase):
        def __iter__(self):
            yield b"one\n"
            yield b"two\n"
            seen.append(capsys.readouterr().out)
            yield b"three\n"

    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": Slow()}))
    _, rest, _ = call(predict, run, "--batch-size", 1)
    # The first text is read ahead, to find a mistake in it before the model is loaded.
    assert [answer["text"] for answer in answers(seen[0] + rest)] == ["one", "two", "three"]
    assert [answer["text"] for answer in answers(seen[0])] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "there is no text to answer."),
        ("a.txt", b"\n \n", "there is no text to answer."),
        ("a.txt", b"fine\n\xff\n", "a.txt, line 2: not UTF-8."),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": ', "a.jsonl, line 3: not JSON: "),
        ("a.jsonl", b'{"text": "x", "text": "y"}', "line 1: not JSON: the key 'text' occurs twic"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: not JSON: brackets are nested too dee"),
        (
            "a.jsonl",
            b'{"text": ' + b"1" * 5000 + b"}",
            "line 1: not JSON: a whole number has 5,000",
        ),
        ("a.csv", b"text,text\nx,y\n", "a.csv, line 1: the header has the column 'text' twice"),
        ("a.jsonl", b'["x"]', 'a.jsonl, line 1: not a JSON object with a field "text".'),
        ("a.json", b'{"txt": "x"}', 'a.json, line 1: not a JSON object with a field "text".'),
        ("a.jsonl", b'{"text": 3}', "a.jsonl, line 1: the text is 3, not a string."),
        (
            "a.csv",
            b"texts\nx\n",
            "a.csv, line 2: no field 'text' among ['texts']. Did you mean texts?",
        ),
        ("a.csv", b"text,label\n", "there is no text to answer."),
        ("a.jsonl", b'{"text": " "}', "a.jsonl, line 1: the text is empty."),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1: the text has half of a surrogate"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(name, content, message, adapter, tmp_path, call):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/native.json").touch()
    code, printed, complained = call(predict, tmp_path / "run", "--file", tmp_path / name)
    assert code == 1 and not printed
    assert message in complained and len(complained.splitlines()) == 1


def test_a_mistake_in_a_later_line_comes_after_the_answers_before_it(adapter, tmp_path, call):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "x"}\n{"text": "y"}\nz\n')
    code, printed, complained = call(predict, adapter(), "--file", file, "--batch-size", 1)
    assert code == 1 and "line 3" in complained
    assert [answer["text"] for answer in answers(printed)] == ["x", "y"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--text", ""), 1, "--text 1: the text is empty."),
        (("--text", "x", "--file", "y"), 2, "not allowed with argument"),
        (("--file", "nowhere.txt"), 1, "nowhere.txt: cannot be read: No such file"),
        (("--file", "."), 1, ".: cannot be read: Is a directory."),
        (("--text", "x", "--batch-size", "0"), 2, "0 is not a whole number of at least 1"),
        (("--txt", "x"), 2, "error: unrecognized arguments: --txt x. Did you mean --text?\n"),
        (("--text", "x", "--device", "tpu"), 1, "--device is 'tpu'; it must be auto, cpu, cuda"),
        (("--text", "x", "--rounds", "3"), 2, "--rounds belongs to --benchmark"),
        (("--text", "x", "--threads", "3"), 2, "--threads belongs to --benchmark"),
        (("--benchmark", "--merged"), 2, "--merged is one row of --benchmark"),
    ],
)
def test_mistakes_of_predict(options, code, message, adapter, call):
    found, printed, complained = call(predict, adapter(), *options)
    assert found == code and not printed and message in complained


def test_a_text_without_tokens(adapter):
    tokenizer = restore(adapter()).base.tokenizer
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="the text '' has no tokens"):
        inference.tokenize(tokenizer, ["x", ""], None)


# ---- benchmark ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "rows"),
    [
        ("dora", ["base", "unmerged", "merged", "4 bits"]),
        ("qlora", ["base", "unmerged", "merged", "4 bits"]),
        ("full", ["base", "unmerged", "merged"]),
    ],
)
def test_the_benchmark_times_every_way(variant, rows, adapter, call):
    run = adapter(f"variant={variant}")
    options = ("--benchmark", "--rounds", 1, "--threads", 1, "--device", "cpu", "--batch-size", 3)
    code, printed, _ = call(predict, run, *options)
    assert code == 0
    assert "1 threads" in printed and "a batch of 3" in printed and "n = 1 rounds" in printed
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if "ms a text" in line)
    table = [re.split(r" {2,}", line) for line in lines[start + 1 :] if line and line[0] != "t"]
    assert [row[0] for row in table] == rows
    assert all(float(value) > 0 for row in table for value in row[1:])
    assert (table[0][2], table[0][4]) == ("1.00", "1.00")
    assert ("nothing is left to keep in 4 bits" in printed) == (variant == "full")


@pytest.mark.parametrize(
    ("variant", "block"), [("dora", ()), ("qlora", ("variant.store.block=32",))]
)
def test_what_is_timed_is_what_it_is_called(variant, block, adapter):
    run = adapter(f"variant={variant}", *block)
    dense = restore(run, dense=True)
    found = serving.ways(run, dense, force=False)
    logits = {
        name: inference.classify(model, dense.base.tokenizer, TEXTS, limit=40)
        for name, model in found.items()
    }
    torch.testing.assert_close(logits["merged"], logits["unmerged"], rtol=0, atol=1e-5)
    assert (logits["base"] - logits["unmerged"]).abs().max() > 0.05
    gap = (logits["4 bits"] - logits["unmerged"]).abs().max()
    assert 1e-4 < gap < (logits["4 bits"] - logits["base"]).abs().max()
    stores = {type(m.store).__name__ for m in found["4 bits"].modules() if hasattr(m, "store")}
    assert stores == {"Nf4Store"}
    if variant == "qlora":
        trained = restore(run)
        expected = inference.classify(trained.model, dense.base.tokenizer, TEXTS, limit=40)
        assert torch.equal(logits["4 bits"], expected)


def test_ratios_are_medians_over_rounds():
    times = {"base": [(1.0, 4.0), (2.0, 8.0), (4.0, 2.0)],
             "merged": [(3.0, 2.0), (2.0, 2.0), (2.0, 4.0)]}  # fmt: skip
    base, merged = (line.split() for line in serving.table(times, 8).splitlines()[1:])
    assert base == ["base", "2000.00", "1.00", "2", "1.00"]
    assert merged == ["merged", "2000.00", "1.00", "4", "2.00"]


def test_the_benchmark_takes_the_given_texts(adapter, tmp_path, call):
    run = adapter()
    options = ("--benchmark", "--rounds", 1, "--threads", 1)
    assert "a batch of 2" in call(predict, run, "--text", "x", "--text", "yy", *options)[1]
    (tmp_path / "empty.txt").touch()
    code, _, complained = call(predict, run, "--file", tmp_path / "empty.txt", *options)
    assert code == 1 and "there is no text to answer." in complained
