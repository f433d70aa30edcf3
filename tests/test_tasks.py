"""Tasks and evaluation: splits, data order, metrics and every error a user's data can cause."""

import gzip
import hashlib
import itertools
import json
import math
import random
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from harness.config.build import make
from harness.tasks import classification
from harness.tasks.classification import Row, TextClassification, classification_metrics
from harness.tasks.hub import HubClassification
from harness.tasks.local import LocalClassification, read_rows
from harness.tasks.movie_sentiment import MovieSentiment, read_movie_sentences
from harness.tasks.rows import BATCHES_PER_SORT, epoch_order, hash_split

CONF = Path(__file__).parents[1] / "conf" / "task"


def byte_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One token a byte between [CLS] and [SEP]."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[CLS]", "[SEP]", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        padding_side=padding_side,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_bert(classes: int, seed: int = 0) -> BertForSequenceClassification:
    """Random weights large enough that predictions differ from row to row; dropout 0.1."""
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=260,
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=20,
            max_position_embeddings=96,
            num_labels=classes,
            initializer_range=0.5,
        )
    )


def sentences(count: int, classes: tuple[str, ...] = ("no", "yes"), seed: int = 0) -> list[Row]:
    """Distinct texts of 3 to 60 characters, at most 94 bytes; ids that are not positions."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        length = draw.randint(0, 57)
        text = f"{seed}{i:x} " + "".join(draw.choices("abcdefgé ", k=length))
        rows.append(Row(10 * i + 7, text, draw.choice(classes)))
    return rows


def small_task(train: int = 103, classes: tuple[str, ...] = ("no", "yes"), **options):
    rows = {
        split: sentences(count, classes, seed)
        for seed, (split, count) in enumerate(
            {"train": train, "validation": 21, "test": 37}.items()
        )
    }
    return TextClassification("small", rows, classes, **options)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models here are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task() -> TextClassification:
    task = small_task()
    task.prepare(byte_tokenizer(), 96)
    return task


@pytest.fixture(scope="module")
def movie() -> MovieSentiment:
    return MovieSentiment()


def take(batches, count):
    return list(itertools.islice(batches, count))


# ---- movie_sentiment -----------------------------------------------------------------------------


def test_movie_sentences_are_split_by_their_hash_the_same_for_ever(movie):
    assert movie.counts == {"train": 8142, "signal": 256, "validation": 1062, "test": 1108}
    digest = {
        split: hashlib.sha256(" ".join(str(row.id) for row in rows).encode()).hexdigest()[:16]
        for split, rows in movie.rows.items()
    }
    assert digest == {
        "train": "553b3ee0ab6e4fdf",
        "signal": "396e3c16981bd995",
        "validation": "5b61551058d58ab4",
        "test": "32185baf1a1720ab",
    }
    assert movie.leaked_rows == 0
    assert movie.labels == ("negative", "positive")
    assert Counter(row.label for row in movie.rows["test"])["positive"] == 561


def test_movie_labels_are_the_sign_of_the_rating_in_the_file():
    path = Path(classification.__file__).parent / "data" / "movie_sentences.tsv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="\r\n") as file:
        ratings = {int(i): float(rating) for i, rating, _ in (x.split("\t") for x in file)}
    rows = read_movie_sentences()
    assert len(rows) == 10_568 == sum(rating != 0 for rating in ratings.values())
    assert all((row.label == "positive") == (ratings[row.id] > 0) for row in rows)
    assert rows[0].text.startswith("The Rock is destined to be the 21st Century's new ''Conan''")
    assert not any(row.text != row.text.strip() for row in rows)


def test_a_changed_or_damaged_movie_file_is_refused(tmp_path):
    path = tmp_path / "m.tsv.gz"
    path.write_bytes(gzip.compress(b"1\t2.0\tGood.", mtime=0))
    with pytest.raises(ValueError, match=r"m\.tsv\.gz: the sha256 of its content is .*, expected"):
        read_movie_sentences(path)
    whole = Path(classification.__file__).parent / "data" / "movie_sentences.tsv.gz"
    for damaged in (b"no gzip", whole.read_bytes()[:5000], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"m\.tsv\.gz: .*reinstall"):
            read_movie_sentences(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_movie_sentences(tmp_path / "absent.gz")


# ---- splits --------------------------------------------------------------------------------------


def test_hash_split_is_sha1_of_the_text_mod_100():
    texts = [row.text for row in sentences(3000)]
    for text in texts:
        number = int.from_bytes(hashlib.sha1(text.encode()).digest(), "big") % 100
        expected = "train" if number >= 20 else ("test", "validation")[number // 10]
        assert hash_split(text) == expected
    shares = Counter(map(hash_split, texts))
    assert 240 < shares["test"] < 360 and 240 < shares["validation"] < 360


def test_signal_rows_have_the_smallest_sha256_and_leave_train():
    task = small_task(train=200, signal_rows=7)
    rows = sentences(200, seed=0)
    expected = sorted(rows, key=lambda row: hashlib.sha256(row.text.encode()).hexdigest())[:7]
    assert {row.id for row in task.rows["signal"]} == {row.id for row in expected}
    assert {row.id for row in task.rows["train"]} == {row.id for row in rows} - {
        row.id for row in expected
    }
    ids = [row.id for row in task.rows["signal"]]
    assert ids == sorted(ids)


@pytest.mark.parametrize(
    ("train", "asked", "got"), [(103, 256, 5), (100, 256, 5), (19, 9, 0), (103, 0, 0)]
)
def test_signal_is_at_most_a_twentieth_of_train(train, asked, got):
    task = small_task(train=train, signal_rows=asked)
    assert task.counts == {"train": train - got, "signal": got, "validation": 21, "test": 37}


def test_negative_signal_rows_are_refused():
    with pytest.raises(ValueError, match="signal_rows is -1"):
        small_task(signal_rows=-1)


def test_fingerprint_sees_every_text_label_id_and_split():
    def fingerprint(change=None, **options):
        rows = {split: sentences(30, seed=i) for i, split in enumerate(classification.SPLITS)}
        if change:
            change(rows)
        return TextClassification("x", rows, ("no", "yes"), **options).fingerprint

    def swap(rows):
        rows["test"], rows["validation"] = rows["validation"], rows["test"]

    def move(rows):
        rows["test"].insert(0, rows["validation"].pop())

    def relabel(rows):
        row = rows["test"][3]
        rows["test"][3] = Row(row.id, row.text, "yes" if row.label == "no" else "no")

    def retext(rows):
        rows["train"][5] = Row(rows["train"][5].id, "other", rows["train"][5].label)

    def renumber(rows):
        rows["validation"][0] = Row(1, rows["validation"][0].text, rows["validation"][0].label)

    assert fingerprint() == fingerprint() == fingerprint(max_tokens=3)
    changed = [fingerprint(change) for change in (swap, move, relabel, retext, renumber)]
    assert len({fingerprint(), fingerprint(signal_rows=0), *changed}) == 7


def test_leaked_rows_are_counted_before_the_signal_slice_and_described():
    rows = {
        "train": sentences(40, seed=0),
        "validation": sentences(5, seed=1),
        "test": sentences(9, seed=2),
    }
    withheld = TextClassification("x", rows, ("no", "yes")).rows["signal"][0]
    rows["test"] = [*rows["test"], withheld, rows["train"][2], rows["train"][2]]
    task = TextClassification("x", rows, ("no", "yes"))
    assert task.leaked_rows == 3
    assert "the text of 3 test rows also occurs in train" in task.describe()


# ---- tokens --------------------------------------------------------------------------------------


def test_rows_are_cut_to_max_tokens_and_the_cut_ones_are_counted():
    task = small_task()
    task.prepare(byte_tokenizer(), 20)
    for split, rows in task.rows.items():
        cut = sum(len(row.text.encode()) + 2 > 20 for row in rows)  # a byte a token, [CLS], [SEP]
        assert task.truncated_rows[split] == cut
    assert sum(task.truncated_rows.values()) > 50
    ids = [
        batch.inputs["input_ids"] for batch in take(task.train_batches(seed=0, batch_size=9), 10)
    ]
    assert max(x.shape[1] for x in ids) == 20
    assert "rows were cut to fit" in task.describe()
    task.prepare(byte_tokenizer(), 96)
    row = max(task.rows["train"], key=lambda row: len(row.text.encode()))
    task.prepare(byte_tokenizer(), len(row.text.encode()) + 2)  # a row that fits exactly is not cut
    assert task.truncated_rows["train"] == 0


def test_tokens_are_kept_for_the_next_process(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_VARIANTS_CACHE", str(tmp_path / "cache"))
    first, again, shorter = small_task(), small_task(), small_task()
    first.prepare(byte_tokenizer(), 40)
    (file,) = (tmp_path / "cache").iterdir()

    class Silent(PreTrainedTokenizerFast):
        def __call__(self, *args, **kwargs):
            raise AssertionError("the text was tokenised again")

    silent = byte_tokenizer()
    silent.__class__ = Silent
    again.prepare(silent, 40)
    assert again._tokens == first._tokens
    assert again.truncated_rows == first.truncated_rows and first.truncated_rows["train"] > 0
    with pytest.raises(AssertionError, match="tokenised again"):  # another length
        shorter.prepare(silent, 39)
    other = small_task(train=50)
    with pytest.raises(AssertionError, match="tokenised again"):  # other data
        other.prepare(silent, 40)

    whole = file.read_bytes()
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    for broken in (whole[:-5], flipped, whole.replace(b'"sha256":"', b'"sha256":"0', 1)):
        file.write_bytes(broken)  # is made anew
        again.prepare(byte_tokenizer(), 40)
        assert again._tokens == first._tokens and file.read_bytes() != broken
    again.prepare(silent, 40)
    monkeypatch.setenv("LORA_VARIANTS_CACHE", str(file / "not a folder"))
    again.prepare(byte_tokenizer(), 40)
    assert again._tokens == first._tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_hold_the_tokens_of_their_rows_and_padding_on_the_tokenizers_side(side):
    task, tokenizer = small_task(), byte_tokenizer(side)
    tokenizer._pad_token_type_id = 3  # as XLNet's
    task.prepare(tokenizer, 96)
    by_id = {row.id: row for row in task.rows["train"]}
    for batch in take(task.train_batches(seed=3, batch_size=6), 16):
        assert set(batch.inputs) == {"input_ids", "token_type_ids", "attention_mask"}
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert ids.dtype == torch.long and ids.shape == mask.shape
        assert mask.sum(1).max() == ids.shape[1]  # trimmed to the longest
        assert batch.n_tokens == mask.sum()
        for i, row_id in enumerate(batch.rows):
            kept = mask[i].bool()
            assert tokenizer.decode(ids[i][kept], skip_special_tokens=True) == by_id[row_id].text
            assert (ids[i][~kept] == 0).all()
            assert (batch.inputs["token_type_ids"][i] == torch.where(kept, 0, 3)).all()
            assert bool(kept[0 if side == "right" else -1])
            assert task.labels[batch.labels[i]] == by_id[row_id].label


def test_batch_moves_to_a_device(task):
    batch = next(task.train_batches(seed=0, batch_size=4))
    moved = batch.to("meta")
    assert {x.device.type for x in (*moved.inputs.values(), moved.labels)} == {"meta"}
    assert moved.rows == batch.rows and moved.n_tokens == batch.n_tokens
    assert batch.labels.device.type == "cpu"


def test_prepare_refuses_what_cannot_work():
    task, tokenizer = small_task(), byte_tokenizer()
    with pytest.raises(ValueError, match="max_tokens is 2; it must be at least 3"):
        task.prepare(tokenizer, 2)
    task.prepare(tokenizer, 3)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        task.prepare(tokenizer, 96)
    rows = {
        split: [Row(4, "é", "a"), Row(9, "x", "b")] for split in ("train", "validation", "test")
    }
    stripping = Tokenizer(models.WordLevel({"[PAD]": 0, "x": 1}, unk_token="x"))
    stripping.pre_tokenizer = pre_tokenizers.Split("é", "removed")
    bare = PreTrainedTokenizerFast(tokenizer_object=stripping, pad_token="[PAD]")
    with pytest.raises(ValueError, match="train row 4: 'é' has no tokens"):
        TextClassification("x", rows, ("a", "b")).prepare(bare, 8)


def test_batches_before_prepare_are_an_error():
    with pytest.raises(RuntimeError, match="call prepare"):
        small_task().train_batches(seed=0, batch_size=4)
    with pytest.raises(RuntimeError, match="call prepare"):
        small_task().example()


def test_example_shows_the_first_row_as_the_model_sees_it(task):
    row, (text, label, tokens, ids) = task.rows["train"][0], task.example().split("\n")
    assert text == f"text    {row.text}"
    assert label.startswith(f"label   {row.label} (class {task.labels.index(row.label)} of 2)")
    assert tokens.startswith("tokens  [CLS] ") and tokens.endswith(" [SEP]")
    assert (
        byte_tokenizer().decode(
            [int(i) for i in ids.removeprefix("ids     ").split()], skip_special_tokens=True
        )
        == row.text
    )


# ---- data order ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "batch_size"), [(1, 1), (1, 8), (5, 8), (8, 8), (7, 3), (103, 8), (1000, 7), (999, 1)]
)
def test_an_epoch_visits_rows_at_most_once_and_drops_only_the_partial_batch(rows, batch_size):
    lengths = np.random.default_rng(0).integers(3, 40, rows).tolist()
    seen: Counter[int] = Counter()
    for epoch in range(4):
        order = epoch_order(lengths, batch_size=batch_size, seed=1, epoch=epoch)
        visited = [i for batch in order for i in batch.tolist()]
        size = min(batch_size, rows)
        assert {len(batch) for batch in order} == {size}
        assert len(visited) == len(set(visited)) == rows // size * size
        assert set(visited) <= set(range(rows))
        seen.update(visited)
    assert len(seen) == rows  # other rows are dropped in other epochs


def test_dropped_rows_are_not_chosen_by_length():
    lengths = list(range(100))
    dropped = [
        row
        for epoch in range(300)
        for row in set(range(100))
        - {
            i
            for batch in epoch_order(lengths, batch_size=16, seed=0, epoch=epoch)
            for i in batch.tolist()
        }
    ]
    assert len(dropped) == 1200
    assert abs(np.mean(dropped) - 49.5) < 4 * 29 / math.sqrt(1200)


def test_order_depends_on_the_seed_and_on_nothing_else(task):
    def order(task, seed, batch_size=8):
        return [
            batch.rows for batch in take(task.train_batches(seed=seed, batch_size=batch_size), 40)
        ]

    expected = order(task, 5)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    before = torch.get_rng_state()
    other = small_task()
    other.prepare(byte_tokenizer(), 96)
    interleaved = other.train_batches(seed=6, batch_size=8)
    got = []
    for batch in take(task.train_batches(seed=5, batch_size=8), 40):
        next(interleaved)
        torch.rand(3)
        got.append(batch.rows)
    assert got == expected == order(other, 5)
    assert order(task, 6) != expected
    torch.set_rng_state(before)
    order(task, 5)
    assert torch.equal(torch.get_rng_state(), before)
    per_epoch = 98 // 8
    assert expected[:per_epoch] != expected[per_epoch : 2 * per_epoch]


@pytest.mark.parametrize("batch_size", [1, 8, 200])
@pytest.mark.parametrize("start", [0, 1, 11, 12, 13])
def test_start_resumes_exactly(task, start, batch_size):
    whole = take(task.train_batches(seed=2, batch_size=batch_size), start + 4)
    resumed = take(task.train_batches(seed=2, batch_size=batch_size, start=start), 4)
    assert [batch.rows for batch in resumed] == [batch.rows for batch in whole[start:]]
    assert all(
        torch.equal(a.inputs["input_ids"], b.inputs["input_ids"])
        for a, b in zip(resumed, whole[start:], strict=True)
    )


def test_a_split_smaller_than_a_batch_is_the_batch(task):
    batches = take(task.train_batches(seed=0, batch_size=1000), 3)
    assert [sorted(batch.rows) for batch in batches] == [
        sorted(row.id for row in task.rows["train"])
    ] * 3


def test_grouping_by_length_saves_padding_without_ordering_the_epoch_by_length(movie):
    lengths = [len(row.text.split()) for row in movie.rows["train"]]
    order = epoch_order(lengths, batch_size=32, seed=0, epoch=0)
    visited = torch.cat(order)
    mixed = visited[torch.randperm(len(visited), generator=torch.Generator().manual_seed(0))]

    def padded_tokens(batches):
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    tokens = sum(lengths[i] for i in visited)
    assert padded_tokens(order) < 1.06 * tokens
    assert padded_tokens(mixed.split(32)) > 1.5 * tokens
    means = [np.mean([lengths[i] for i in batch]) for batch in order]
    place = np.arange(len(means)) % BATCHES_PER_SORT
    assert abs(np.corrcoef(means, place)[0, 1]) < 0.25


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batch_size_below_one_is_refused(task, batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}"):
        task.train_batches(seed=0, batch_size=batch_size)


# ---- loss and evaluation -------------------------------------------------------------------------


def row_by_row(task, model, split, only=None):
    """(row id, float64 log-probabilities (c,)) with one unpadded row at a time."""
    tokenizer, model = byte_tokenizer(), model.eval()
    for row in task.rows[split]:
        if only is not None and row.id not in only:
            continue
        ids = torch.tensor([tokenizer(row.text)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0].double().numpy()
        yield row, logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def test_evaluation_agrees_with_one_row_at_a_time():
    labels = ("a", "b", "c")
    task = small_task(classes=labels)
    task.prepare(byte_tokenizer(), 96)
    model = tiny_bert(3)
    evaluation = task.evaluate(model, "test", batch_size=5, device="cpu")
    expected = list(row_by_row(task, model, "test"))
    assert [item["row"] for item in evaluation.predictions] == [row.id for row, _ in expected]
    guesses = set()
    for item, (row, log_p) in zip(evaluation.predictions, expected, strict=True):
        assert set(item) == {"row", "label", "prediction", "correct", "loss_nats"}
        assert item["label"] == row.label
        assert item["prediction"] == labels[int(log_p.argmax())]
        assert item["correct"] is (item["prediction"] == row.label)
        assert item["loss_nats"] == pytest.approx(-log_p[labels.index(row.label)], abs=2e-5)
        guesses.add(item["prediction"])
    assert len(guesses) > 1  # else this test would see little
    metrics = evaluation.metrics
    losses = [item["loss_nats"] for item in evaluation.predictions]
    assert metrics["n"] == 37
    assert metrics["loss_nats"] == pytest.approx(sum(losses) / 37, abs=1e-6)
    assert metrics["accuracy"] == sum(item["correct"] for item in evaluation.predictions) / 37
    assert json.loads(json.dumps(evaluation.predictions)) == evaluation.predictions
    assert json.loads(json.dumps(metrics)) == metrics


def test_predictions_do_not_depend_on_the_batch_size(task):
    model = tiny_bert(2)
    one, some, all_ = (
        task.evaluate(model, "validation", batch_size=size, device="cpu") for size in (1, 8, 1000)
    )
    for other in (some, all_):
        assert other.metrics == pytest.approx(one.metrics, abs=1e-5)
        for a, b in zip(one.predictions, other.predictions, strict=True):
            assert a | {"loss_nats": 0} == b | {"loss_nats": 0}
            assert a["loss_nats"] == pytest.approx(b["loss_nats"], abs=2e-5)


def test_evaluation_leaves_mode_gradients_and_random_state_alone(task):
    model = tiny_bert(2).train()
    model.bert.embeddings.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    task.evaluate(model, "signal", batch_size=2, device="cpu")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="out of memory"):
        broken = model.bert.pooler.dense.register_forward_hook(_out_of_memory)
        task.evaluate(model, "test", batch_size=2, device="cpu")
    broken.remove()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()


def _out_of_memory(module, inputs, output):
    raise RuntimeError("out of memory")


def test_what_a_layer_caches_in_evaluation_can_be_trained_with(task):
    model = tiny_bert(2).train()
    cached = []
    model.bert.pooler.dense.register_forward_hook(lambda m, x, y: cached.append(y))
    task.evaluate(model, "validation", batch_size=8, device="cpu")
    weight = torch.ones(12, requires_grad=True)
    (cached[0] @ weight).sum().backward()  # an inference tensor could not be saved for backward


def test_loss_is_the_mean_cross_entropy_in_float32_with_gradients(task):
    model = tiny_bert(2).eval()
    batch = next(task.train_batches(seed=0, batch_size=9))
    loss = task.loss(model, batch)
    expected = np.mean(
        [
            -log_p[task.labels.index(row.label)]
            for row, log_p in row_by_row(task, model, "train", only=batch.rows)
        ]
    )
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    assert task.loss(model.bfloat16(), batch).dtype == torch.float32


def test_evaluation_of_an_unknown_or_empty_split_is_refused(task):
    with pytest.raises(ValueError, match="split is 'dev'; it must be one of"):
        task.evaluate(tiny_bert(2), "dev", batch_size=2, device="cpu")
    empty = small_task(signal_rows=0)
    empty.prepare(byte_tokenizer(), 96)
    with pytest.raises(ValueError, match="no rows in 'signal'"):
        empty.evaluate(tiny_bert(2), "signal", batch_size=2, device="cpu")


def test_metrics_by_hand():
    # Class 0: 2 TP of 3 gold, 2 predicted: 4/5. Class 1: 0 of 1 gold, 2 predicted: 0.
    # Class 2: 1 TP of 2 gold, 1 predicted: 2/3. Class 5: predicted once, never gold: 0.
    # Classes 3 and 4: never gold, never predicted: left out.
    gold = np.array([0, 0, 0, 1, 2, 2])
    predicted = np.array([0, 0, 1, 5, 2, 1])
    metrics = classification_metrics(predicted, gold, np.arange(6.0))
    assert metrics == pytest.approx(
        {"accuracy": 0.5, "macro_f1": (4 / 5 + 0 + 2 / 3 + 0) / 4, "loss_nats": 2.5, "n": 6}
    )


@pytest.mark.parametrize("seed", range(5))
def test_metrics_against_plain_loops(seed):
    draw = random.Random(seed)
    gold = [draw.randrange(9) for _ in range(40)]
    predicted = [g if draw.random() < 0.5 else draw.randrange(11) for g in gold]
    scores = []
    for name in {*gold, *predicted}:
        pairs = [(g == name, p == name) for g, p in zip(gold, predicted, strict=True)]
        hits = pairs.count((True, True))
        precision = hits / max(1, hits + pairs.count((False, True)))
        recall = hits / max(1, hits + pairs.count((True, False)))
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    metrics = classification_metrics(np.array(predicted), np.array(gold), np.zeros(40))
    assert metrics["macro_f1"] == pytest.approx(sum(scores) / len(scores))


# ---- local files ---------------------------------------------------------------------------------

INTENTS = ("card_arrival", "age_limit", "top_up_failed", "lost_phone", "Refund")


def write_jsonl(path: Path, rows) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(("\n".join(lines) + "\n").encode())
    return path


def intents(count: int, seed: int) -> list[dict]:
    return [
        {"text": f"{row.text} {i}", "label": INTENTS[i % 5]}
        for i, row in enumerate(sentences(count, seed=seed))
    ]


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    return {
        split: str(write_jsonl(tmp_path / f"{split}.jsonl", intents(count, seed)))
        for seed, (split, count) in enumerate({"train": 60, "validation": 11, "test": 13}.items())
    }


def test_local_files_of_many_classes_train_and_evaluate(files):
    task = LocalClassification(files)
    assert task.labels == ("Refund", "age_limit", "card_arrival", "lost_phone", "top_up_failed")
    assert task.counts == {"train": 57, "signal": 3, "validation": 11, "test": 13}
    assert [row.id for row in task.rows["test"]] == list(range(1, 14))
    task.prepare(byte_tokenizer(), 96)
    model = tiny_bert(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in take(task.train_batches(seed=0, batch_size=8), 2):
        task.loss(model, batch).backward()
        optimizer.step()
    evaluation = task.evaluate(model, "test", batch_size=4, device="cpu")
    assert evaluation.metrics["n"] == 13
    assert {item["label"] for item in evaluation.predictions} == set(INTENTS)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "tsv", "CSV"])
def test_the_same_rows_from_every_format(tmp_path, extension, mark, newline):
    texts = ['say "hi", twice', "tab\tand é 漢 🙂", "line\u2028separator\x85", " padded "]
    labels = ["b", "a", "b", "c"]
    if extension in ("jsonl", "json"):
        lines = [
            json.dumps({"text": text, "label": label, "extra": 1}, ensure_ascii=False)
            for text, label in zip(texts, labels, strict=True)
        ]
        lines.insert(2, "")  # a blank line is skipped and counted
        expected_ids = [1, 2, 4, 5]
    else:
        separator = "\t" if extension == "tsv" else ","
        quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
        lines = [f"label{separator}text"]
        lines += [f"{a}{separator}{b}" for a, b in zip(labels, quoted, strict=True)]
        lines.insert(3, "")
        expected_ids = [2, 3, 5, 6]
    path = tmp_path / f"rows.{extension}"
    path.write_bytes((mark + newline.join(lines) + newline).encode())
    rows = read_rows(path)
    assert rows == [
        Row(i, text, label) for i, text, label in zip(expected_ids, texts, labels, strict=True)
    ]


def test_a_csv_field_may_hold_newlines_and_ids_stay_line_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,label\r\n"two\r\nlines",x\r\nplain,y\r\n')
    assert read_rows(path) == [Row(2, "two\r\nlines", "x"), Row(4, "plain", "y")]


def test_other_field_names(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("id\tsentence\tintent\n1\thello\tx\n2\tbye\ty\n")
    rows = read_rows(path, text_field="sentence", label_field="intent")
    assert rows == [Row(2, "hello", "x"), Row(3, "bye", "y")]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, 2], ("2", "9", "10")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["1.5", "10", "2"], ("1.5", "2", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        ([True, False], ("false", "true")),
        ([1, "1 ", "0"], ("0", "1")),
    ],
)
def test_label_names_are_sorted_by_value_if_numeric(tmp_path, labels, names):
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert LocalClassification({"train": path, "validation": path, "test": path}).labels == names


def test_without_validation_some_of_train_is_held_out_by_hash(files):
    del files["validation"]
    task = LocalClassification(files)
    train = [row for row in intents(60, 0) if hash_split(row["text"]) == "validation"]
    assert [row.text for row in task.rows["validation"]] == [row["text"] for row in train]
    assert task.counts["validation"] + task.counts["train"] + task.counts["signal"] == 60
    assert "validation was held out from train by" in task.describe()
    assert LocalClassification({**files, "validation": None}).fingerprint == task.fingerprint


def test_too_few_rows_to_hold_out_any(tmp_path, files):
    rows = [row for row in intents(60, 0) if hash_split(row["text"]) != "validation"][:12]
    train = write_jsonl(tmp_path / "few.jsonl", rows)
    with pytest.raises(ValueError, match=r"few\.jsonl: 12 rows are too few to hold out"):
        LocalClassification({"train": train, "test": files["test"]})


GOOD = '{"text": "fine", "label": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", r"x\.txt: the extension must be one of \.jsonl, \.json, \.csv, \.tsv"),
        ("x.jsonl", None, r"x\.jsonl: cannot be read: No such file"),
        ("x.jsonl", b"", r"x\.jsonl: no rows"),
        ("x.jsonl", b"\n\n", r"x\.jsonl: no rows"),
        ("x.csv", b"text,label\n", r"x\.csv: no rows"),
        (
            "x.jsonl",
            GOOD.encode() + b'{"text": "caf\xe9", "label": "a"}',
            r"x\.jsonl, line 2: not UTF",
        ),
        ("x.jsonl", GOOD.encode("utf-16"), r"x\.jsonl, line 1: not UTF-8"),
        ("x.csv", b"text,label\n\nfine,a\ncaf\xe9,b", r"x\.csv, line 4: not UTF-8"),
        ("x.jsonl", GOOD.encode() + b"\n{'text': 1}\n", r"line 3: malformed JSON \(Expecting prop"),
        (
            "x.json",
            b'[\n{"text": "a", "label": "b"}\n]',
            r"line 1: malformed JSON .* object a line",
        ),
        ("x.jsonl", b'["text", "label"]', r"line 1: expected a JSON object, found"),
        (
            "x.jsonl",
            b'{"txt": "a", "label": "b"}',
            r"1: no field 'text' among \['label', 'txt'\]\. task\.text_field names it\. .*mean txt",
        ),
        (
            "x.jsonl",
            GOOD.encode() + b'{"text": "a"}',
            r"line 2: no field 'label' among \['text'\]\. task\.label_field names it\.",
        ),
        ("x.csv", b"text,labels\na,b", r"line 2: no field 'label' .*Did you mean labels"),
        (
            "x.jsonl",
            GOOD.encode() + b'{"text": " ", "label": "b"}',
            r"line 2: field 'text' is empty",
        ),
        ("x.jsonl", b'{"text": "a", "label": ""}', r"line 1: field 'label' is empty"),
        ("x.csv", b"text,label\na, ", r"line 2: field 'label' is empty"),
        ("x.jsonl", b'{"text": 3, "label": "b"}', r"line 1: field 'text' is 3, not a string"),
        ("x.jsonl", b'{"text": null, "label": "b"}', r"line 1: field 'text' is None, not a string"),
        (
            "x.jsonl",
            b'{"text": "a", "label": 0.5}',
            r"'label' is 0\.5; a label is a string or an int",
        ),
        ("x.jsonl", b'{"text": "a", "label": null}', r"'label' is None; a label is"),
        ("x.jsonl", b'{"text": "a \\ud83d", "label": "a"}', r"line 1: .*half of a surrogate pair"),
        ("x.csv", b"text,label\na,b\nc,d,e\n", r"line 3: 3 fields, but the header has 2"),
        ("x.csv", b'text,label\n"two\nlines",b\nc\n', r"line 4: 1 fields, but the header has 2"),
        (
            "x.csv",
            b'text,label\na,b\n"c,d\ne,f\n',
            r"line 3: malformed csv \(unexpected end of data",
        ),
        ("x.tsv", b'text\tlabel\n"a" b\tc\n', r"line 2: malformed tsv"),
        ("x.csv", b"text,label,text\na,b,c\n", r"line 1: the header has the column 'text' twice"),
        ("x.tsv", b"\nlabel\ttext\tlabel\na\tb\tc\n", r"line 2: the header .* 'label' twice"),
        ("x.csv", b"text, text ,label\na,b,c\n", r"line 1: the header .*'text' twice; rename"),
        (
            "x.jsonl",
            GOOD.encode() + b'{"text": "a", "label": "b", "text": "c"}',
            r"line 2: the key 'text' occurs twice in an object\.$",
        ),
        (
            "x.jsonl",
            b'{"text": "a", "label": "b", "more": [{"x": 1, "x": 1}]}',
            r"line 1: the key 'x' occurs twice",
        ),
        (
            "x.jsonl",
            GOOD.encode() + b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            r"x\.jsonl, line 2: brackets are nested too deep\.$",
        ),
        ("x.jsonl", GOOD.encode() + b"[" * 100_000, r"line 2: brackets are nested too deep\.$"),
        (
            "x.jsonl",
            GOOD.encode() + b'{"text": "a", "label": ' + b"7" * 5000 + b"}",
            r"x\.jsonl, line 2: a whole number has 5,000 digits\.$",
        ),
        (
            "x.jsonl",
            b'{"text": ' + b"[" * 60 + b"]" * 60 + b', "label": "a"}',
            r"field 'text' is \[\[\[\[\.\.\.\]\]\]\], not a string",
        ),
    ],
)
def test_every_malformed_file_is_one_sentence_with_file_and_line(
    tmp_path, files, name, content, message
):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=message) as caught:
            LocalClassification({**files, split: path})
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", range(200, 1100, 50))
def test_no_depth_of_brackets_is_a_traceback(tmp_path, depth):
    path = tmp_path / "deep.jsonl"
    path.write_text(f'{{"text": {"[" * depth}{"]" * depth}, "label": "a"}}')
    with pytest.raises(ValueError, match=r"deep\.jsonl, line 1: (brackets|field 'text' is \[)"):
        read_rows(path)


def test_columns_without_a_name_may_be_several(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(",text,label,\n1,hello,x,\n2,bye,y,\n")
    assert read_rows(path) == [Row(2, "hello", "x"), Row(3, "bye", "y")]


def test_lines_that_quotes_join_are_counted_and_said(tmp_path, files):
    """A TSV that was written without quoting: what begins with a quotation mark swallows lines."""
    labels = ["Refund"] * 6
    texts = ["plain", '"quoted', "swallowed", 'and ended"', "plain too", '"one line"']
    lines = [f"{a}\t{b}" for a, b in zip(labels, texts, strict=True)]
    path = tmp_path / "joined.tsv"
    path.write_text("\n".join(["label\ttext", *lines]) + "\n")
    assert len(read_rows(path)) == 4
    task = LocalClassification({**files, "test": path})
    assert "1 rows of joined.tsv hold line breaks within quotes, the first from line 3 on" in (
        task.describe()
    )
    assert "line breaks" not in LocalClassification(files).describe()


def test_copied_rows_are_counted_and_said(tmp_path, files):
    train = intents(60, 0)
    spaced = [{**row, "text": f"  {row['text']}".replace(" ", "  ", 3)} for row in train[:4]]
    validation = write_jsonl(tmp_path / "copied.jsonl", [*train[:3], *intents(5, 7)])
    test = write_jsonl(tmp_path / "spaced.jsonl", [*spaced, train[9], *intents(2, 7)])
    task = LocalClassification({**files, "validation": validation, "test": test})
    said = task.describe()
    assert "the text of 3 validation rows also occurs in train;" in said
    assert "the text of 5 test rows also occurs in train, 4 of them but for white space" in said
    assert "the text of 5 test rows also occurs in validation, 3 of them but for white" in said
    assert task.leaked_rows == 5
    assert "also occurs" not in LocalClassification(files).describe()


def test_a_directory_is_not_a_file(tmp_path, files):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"folder\.jsonl: cannot be read"):
        LocalClassification({**files, "train": tmp_path / "folder.jsonl"})


def test_labels_unseen_in_train_are_named_with_the_nearest(tmp_path, files):
    for split in ("validation", "test"):
        rows = [*intents(4, 9), {"text": "x", "label": "card_arival"}]
        path = write_jsonl(tmp_path / "bad.jsonl", rows)
        message = (
            r"bad\.jsonl, line 5: label 'card_arival' does not occur in train, where \d+ "
            r"labels do\. Did you mean card_arrival\?"
        )
        with pytest.raises(ValueError, match=message):
            LocalClassification({**files, split: path})
    path = write_jsonl(tmp_path / "bad.jsonl", [{"text": "x", "label": "zzz"}])
    with pytest.raises(ValueError, match=r"'zzz' does not occur in train, where 5 labels do\.$"):
        LocalClassification({**files, "test": path})


def test_one_class_is_refused(tmp_path, files):
    path = write_jsonl(tmp_path / "one.jsonl", [{"text": f"t{i}", "label": "a"} for i in range(9)])
    with pytest.raises(ValueError, match=r"one\.jsonl: every label is 'a'; at least two"):
        LocalClassification({**files, "train": path})


def test_missing_and_unknown_splits(files):
    for split in ("train", "test"):
        rest = {name: path for name, path in files.items() if name != split}
        for given in (rest, {**rest, split: None}):
            with pytest.raises(ValueError, match=rf"a {split} file: task\.files\.{split}=<path>"):
                LocalClassification(given)
    with pytest.raises(ValueError, match=r"files\.valid: no such split.*Did you mean validation"):
        LocalClassification({**files, "valid": files["test"]})


# ---- hub -----------------------------------------------------------------------------------------


class ColumnTable:
    """The part of `datasets.Dataset` that the task reads."""

    def __init__(self, columns: dict[str, list], names: list[str] | None = None):
        self.columns = columns
        self.column_names = list(columns)
        feature = types.SimpleNamespace(names=names) if names else types.SimpleNamespace()
        self.features = dict.fromkeys(columns, feature)

    def __getitem__(self, name: str) -> list:
        return self.columns[name]


def table(count: int, seed: int, names: list[str] | None = None) -> ColumnTable:
    rows = sentences(count, ("0", "1", "2"), seed)
    labels = [int(row.label) for row in rows]
    return ColumnTable({"text": [row.text for row in rows], "label": labels}, names)


SPLIT_NAMES = {"train": "train", "validation": "validation", "test": "test"}


@pytest.fixture
def hub(monkeypatch):
    """Stands for the `datasets` module; what it holds is what load_dataset returns."""
    data = {
        name: table(n, n, ["neg", "pos", "mid"])
        for name, n in zip(SPLIT_NAMES, (50, 9, 8), strict=True)
    }
    asked = []

    def load_dataset(path, name=None, *, revision=None):
        asked.append((path, name, revision))
        return data

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return types.SimpleNamespace(data=data, asked=asked, module=module)


def test_hub_uses_the_class_labels_in_their_own_order(hub):
    task = HubClassification("some/set", splits=SPLIT_NAMES, config="sst2", revision="abc")
    assert hub.asked == [("some/set", "sst2", "abc")]
    assert task.labels == ("neg", "pos", "mid")
    assert task.counts == {"train": 48, "signal": 2, "validation": 9, "test": 8}
    first, source = task.rows["test"][0], hub.data["test"]
    assert first == Row(0, source["text"][0], task.labels[source["label"][0]])


def test_hub_without_class_labels_or_validation(hub):
    hub.data["train"], hub.data["test"] = table(90, 90), table(8, 8)
    task = HubClassification("some/set", splits={**SPLIT_NAMES, "validation": None})
    assert task.labels == ("0", "1", "2")
    assert 0 < task.counts["validation"] < 20
    assert "validation was held out" in task.describe()


def test_hub_errors_are_one_sentence(hub, monkeypatch):
    def expect(message, dataset="some/set", splits=SPLIT_NAMES, **options):
        with pytest.raises(ValueError, match=message):
            HubClassification(dataset, splits=splits, **options)

    expect(r"task\.dataset=", dataset=None)
    expect(r"task\.splits\.test=", splits={"train": "train", "test": None})
    expect(r"no split 'trian' .*Did you mean train", splits={**SPLIT_NAMES, "train": "trian"})
    expect(r"no split 'dev' .*null holds out", splits={**SPLIT_NAMES, "validation": "dev"})
    expect(r"some/set, train: no field 'txt' .*Did you mean text", text_field="txt")
    hub.data["test"].columns["label"][3] = -1
    expect(r"some/set, test, row 3: 'label' is -1, which is not a class")
    hub.data["test"].columns["label"][3] = 0
    hub.data["validation"].columns["text"][2] = " "
    expect(r"some/set, validation, row 2: 'text' is ' '; it must be text")
    hub.data["validation"] = ColumnTable({"text": [], "label": []})
    expect(r"some/set, validation: no rows")
    hub.data["validation"] = ColumnTable({"text": ["a"], "label": ["possy"]})
    expect(r"validation, row 0: label 'possy' does not occur in train")

    def offline(*args, **options):
        raise ConnectionError("Couldn't reach the Hub\nTraceback ...")

    monkeypatch.setattr(hub.module, "load_dataset", offline)
    expect(r"'some/set' cannot be loaded .*in reach\?\): Couldn't reach the Hub$")


def test_hub_without_datasets_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'pip install "lora-variants\[hub\]"'):
        HubClassification("some/set", splits=SPLIT_NAMES)


# ---- configuration -------------------------------------------------------------------------------


def test_every_task_config_builds_its_task(hub, files):
    given = {"movie_sentiment": {}, "local": {"files": files}, "hub": {"dataset": "some/set"}}
    assert set(given) <= {path.stem for path in CONF.glob("*.yaml")}
    for name, options in given.items():
        config = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), options)
        task = instantiate(config)
        assert task.name == name
        assert task.max_tokens == config.max_tokens == 64
        assert task.primary_metric == "accuracy"
        assert list(task.counts) == ["train", "signal", "validation", "test"]


def test_importing_harness_does_not_import_torch():
    code = "import harness, sys; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_option_that_a_task_sets_itself_is_refused_by_name(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.csv").write_text("text,label\nx,a\ny,b\n" * 9)
    files = {split: str(tmp_path / f"{split}.csv") for split in ("train", "validation", "test")}
    config = {"_target_": "harness.tasks.local.LocalClassification", "files": files, "notes": "x"}
    with pytest.raises(ValueError, match=r"^task sets notes itself; leave it out\.$"):
        make({"task": config}, "task")


@pytest.mark.parametrize("target", ["local.LocalClassification", "local_language.LocalText"])
@pytest.mark.parametrize("option", ["max_tokns", "name"])
def test_an_option_that_a_task_would_hand_on_is_refused_by_name(target, option):
    config = {"task": {"_target_": f"harness.tasks.{target}", "files": {}, option: 3}}
    with pytest.raises(ValueError, match=f"^task would ignore the option {option}"):
        make(config, "task")
