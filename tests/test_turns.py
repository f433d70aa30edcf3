"""Turns as tokens, against transformers: the ids of `apply_chat_template`, the mask of a template's
own {% generation %} blocks, generation with the template's end as EOS, and tokenizers of the kinds
that checkpoints bring."""

import inspect
import json
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from templates import KINDS, a_tokenizer, messages, unmarked
from tokenizers import processors
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from harness.adapter import answers, inference
from harness.tasks.encoding import encode
from harness.tasks.language import IGNORED, LanguageModelling, prompt_tokens
from harness.tasks.turns import End, Row, Writer, Writing

ENDS = {
    "llama3": "<|eot_id|>", "chatml": "<|im_end|>", "chatml_bos": "<|im_end|>",
    "zephyr_first": "</s>", "zephyr_always": "</s>", "zephyr_llama2": "</s>",
    "gemma": "<end_of_turn>", "mistral": "</s>", "mistral_v1": "</s>", "text": None,
    "endless": "</s>",
}  # fmt: skip
CONVERSATIONS = [
    (("user", "what is it"), ("assistant", "yes")),
    (("user", "hello"), ("assistant", " no, the answer"), ("user", "is it? \n"),
     ("assistant", "a list\n of words")),
]  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)


def served(tokenizer, turns, *, ask=False, **options):
    """transformers' ids; a template that asks for the date is given ours."""
    shown = {"date_string": "26 Jul 2024"} if "date_string" in tokenizer.chat_template else {}
    return tokenizer.apply_chat_template(
        messages(turns), add_generation_prompt=ask, return_dict=False, **shown, **options
    )


def prepared(tokenizer, conversations=CONVERSATIONS, **settings):
    rows = [Row(i, turns) for i, turns in enumerate(conversations)]
    data = {"train": rows * 3, "validation": rows, "test": rows}
    task = LanguageModelling("made_up", data, signal_rows=0, max_tokens=400, **settings)
    task.prepare(tokenizer, 400)
    return task


# ---- the tokens ----------------------------------------------------------------------------------


@every_kind
def test_ids_and_mask_are_those_of_the_whole_conversation(kind):
    marked, tokenizer = KINDS[kind](), unmarked(KINDS[kind]())
    task = prepared(tokenizer)
    writer = Writer(tokenizer, Writing())
    for i, turns in enumerate(CONVERSATIONS):
        ids, labels = (task._tokens["test"][field][i] for field in ("input_ids", "labels"))
        expected = served(tokenizer, turns)
        added = [tokenizer.eos_token_id] if kind == "endless" else []
        assert ids == [*expected, *added]
        shown = {"date_string": "26 Jul 2024"} if kind == "llama3" else {}
        oracle = marked.apply_chat_template(
            messages(turns), return_dict=True, return_assistant_tokens_mask=True, **shown
        )
        assert oracle["input_ids"] == expected
        mask = [*oracle["assistant_masks"], *(1 for _ in added)]
        assert [label != IGNORED for label in labels] == [bool(x) for x in mask]
        asked = served(tokenizer, turns[:-1], ask=True)
        assert task._prompt("test", i) == asked
        if len(turns) == 2:
            assert prompt_tokens(turns[0][1], writer) == asked
        bos = tokenizer.bos_token_id
        assert bos is None or ids.count(bos) == expected.count(bos) <= 1


@pytest.mark.parametrize("trim", [False, True])
def test_a_token_on_a_seam_is_learned_and_counted(trim):
    """Two line breaks are one token of this tokenizer's: one of the template, one of the answer."""
    turns = (("user", "hello"), ("assistant", "\n\nyes"))
    tokenizer = unmarked(KINDS["chatml"]())
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n\nyes")["input_ids"][:1]) == ["ĊĊ"]
    task = prepared(tokenizer, [turns, CONVERSATIONS[0]])
    ids, labels = (task._tokens["test"][field][0] for field in ("input_ids", "labels"))
    assert ids == served(tokenizer, turns)
    oracle = KINDS["chatml"]().apply_chat_template(
        messages(turns), return_dict=True, return_assistant_tokens_mask=True
    )
    assert [label != IGNORED for label in labels] == [bool(x) for x in oracle["assistant_masks"]]
    assert task._prompt("test", 0) == served(tokenizer, turns[:-1], ask=True)
    assert "in 5 rows a token holds the end of a prompt and the beginning" in task.describe()
    again = prepared(tokenizer, [turns, CONVERSATIONS[0]])  # from the cache
    assert again.describe() == task.describe()


def test_a_token_that_holds_an_answers_end_and_the_next_turn_is_learned():
    """Each token that has a character of an answer, by the tokenizer's own offsets."""
    template = (
        "{% for message in messages %}{{ '\n\n' + message['role'] + ': ' + message['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '\n\nassistant: ' }}{% endif %}"
    )
    tokenizer = a_tokenizer(template, "bytes", eos="</s>")
    turns = (("user", "hello"), ("assistant", "no\n"), ("user", "is it?"), ("assistant", "yes"))
    task = prepared(tokenizer, [turns, CONVERSATIONS[0]])
    ids, labels = (task._tokens["test"][field][0] for field in ("input_ids", "labels"))
    whole = tokenizer.apply_chat_template(messages(turns), tokenize=False)
    encoded = tokenizer(whole, return_offsets_mapping=True)
    learned = [range(whole.index(text), whole.index(text) + len(text)) for text in ("no\n", "yes")]
    expected = [
        any(at in answer for answer in learned for at in range(*span))
        for span in encoded["offset_mapping"]
    ]
    assert ids == [*encoded["input_ids"], tokenizer.eos_token_id]
    assert [label != IGNORED for label in labels] == [*expected, True]
    shared = tokenizer.convert_tokens_to_ids("ĊĊ")
    assert shared in labels


@pytest.mark.parametrize("kind", ["chatml", "zephyr_first", "zephyr_always", "zephyr_llama2"])
def test_a_seam_behind_a_control_token_is_where_it_would_be_without_one(kind):
    tokenizer, learned = unmarked(KINDS[kind]()), {}
    token = "<|im_end|>" if kind == "chatml" else "</s>"
    for text in ("what", f"{token}what"):
        task = prepared(tokenizer, [(("user", text), ("assistant", "\n\nyes")), CONVERSATIONS[0]])
        learned[text] = [label for label in task._tokens["test"]["labels"][0] if label != IGNORED]
        assert sum(task.shared_rows.values()) == 5
    assert learned[text] == learned["what"]


class WithoutOffsets(PreTrainedTokenizerFast):
    is_fast = False

    def __call__(self, *arguments, **options):
        if options.get("return_offsets_mapping"):
            raise NotImplementedError
        return super().__call__(*arguments, **options)


def test_a_tokenizer_without_offsets_is_proven_equal_or_refused():
    tokenizer = unmarked(KINDS["chatml"]())
    expected = prepared(tokenizer)._tokens
    tokenizer.__class__ = WithoutOffsets
    assert prepared(tokenizer, date="2024-07-27")._tokens == expected  # another date: not cached
    turns = (("user", "hello"), ("assistant", "\n\nyes"))
    with pytest.raises(ValueError, match=r"^row 1: WithoutOffsets does not say which.*chat=false"):
        prepared(tokenizer, [CONVERSATIONS[0], turns])


@pytest.mark.parametrize("kind", ["zephyr_first", "zephyr_always", "zephyr_llama2"])
def test_a_completion_is_tokenised_behind_its_prompt(kind):
    """Without a template: not as the beginning of a text, before which such tokenizers put a
    space."""
    tokenizer = KINDS[kind]()
    task = prepared(tokenizer, [CONVERSATIONS[0]], chat=False, prompt_template="{prompt}\n")
    ids, labels = (task._tokens["test"][field][0] for field in ("input_ids", "labels"))
    assert ids == [*tokenizer("what is it\nyes")["input_ids"], tokenizer.eos_token_id]
    learned = [x for x in labels if x != IGNORED]
    assert "▁" not in "".join(tokenizer.convert_ids_to_tokens(learned))
    assert task._prompt("test", 0) == tokenizer("what is it\n")["input_ids"]


def test_a_prompt_stays_what_is_given_to_answer():
    """Without a template, where a token would lie on both sides."""
    tokenizer = KINDS["zephyr_first"]()
    spaced = [(("user", "what is it"), ("assistant", "yes"))]
    task = prepared(tokenizer, spaced, chat=False, prompt_template="{prompt}: ")
    ids = task._tokens["test"]["input_ids"][0]
    prompt = tokenizer("what is it: ")["input_ids"]
    assert ids[: len(prompt)] == prompt == task._prompt("test", 0)
    assert tokenizer.decode(ids[len(prompt) :]) == "yes</s>"
    assert "▁" not in "".join(tokenizer.convert_ids_to_tokens(ids[len(prompt) :]))


def test_a_prompt_template_may_write_the_bos_itself():
    tokenizer = KINDS["mistral"]()
    task = prepared(
        tokenizer, [CONVERSATIONS[0]], chat=False, prompt_template="<s>[INST] {prompt} [/INST]"
    )
    ids = task._tokens["test"]["input_ids"][0]
    assert ids.count(tokenizer.bos_token_id) == 1 == ids.count(tokenizer.eos_token_id)
    assert ids[:2] == tokenizer.convert_tokens_to_ids(["<s>", "[INST]"])


# ---- the end -------------------------------------------------------------------------------------


class Scripted(LlamaForCausalLM):
    """Answers every prompt with the same tokens, whatever its weights."""

    def say(self, tokens):
        self.tokens = tokens

    def forward(self, input_ids=None, past_key_values=None, **_):
        self.place = 0 if input_ids.shape[1] > 1 else self.place + 1
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        logits[:, -1, self.tokens[self.place]] = 9.0
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def scripted(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = Scripted(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    return model


@every_kind
def test_answers_end_where_the_labels_teach_it(kind):
    """The answers of a model that has learned its labels to the last, and runs on after them."""
    tokenizer = unmarked(KINDS[kind]())
    task = prepared(tokenizer, [CONVERSATIONS[0]], generate_rows=1, max_new_tokens=40)
    labels = task._tokens["test"]["labels"][0]
    learned = [label for label in labels if label != IGNORED]
    prompt = task._prompt("test", 0)
    model = scripted(tokenizer)
    noise = tokenizer("no", add_special_tokens=False)["input_ids"]
    model.say([*learned, *noise * 40])
    task_config = {"task": {**vars(task.writing), "max_new_tokens": 40}}
    base = SimpleNamespace(model=model, tokenizer=tokenizer, max_tokens=400)
    restored = SimpleNamespace(base=base, config=task_config)
    ((made,),) = answers.generations(restored, [["what is it"]], "cpu")
    assert made["answer"].strip() == "yes"
    found = task.evaluate(model, "test", batch_size=1, device="cpu")
    assert found.metrics["exact_match"] == 1.0
    assert task.writer.end.texts == (("\n### End",) if kind == "text" else ())
    said = {
        "text": r"; answers end at the text '\n### End'",
        "endless": "writes no end of a turn: '</s>'",
    }
    eos = ENDS[kind] == tokenizer.eos_token
    other = "" if eos else f"; answers end at {ENDS[kind]!r} (eos_token_id="
    assert said.get(kind, other) in task.describe()
    assert ("end at" in task.describe()) == (not eos)
    if kind == "text":
        assert found.generation["stop"] == ["\n### End"]
        return
    end = tokenizer.convert_tokens_to_ids(ENDS[kind])
    assert task.writer.end.tokens == (end,) and end in learned
    assert found.generation["eos_token_id"] == sorted({end, tokenizer.eos_token_id})
    theirs = model.generate(  # with that token as EOS
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
        eos_token_id=end, pad_token_id=0, max_new_tokens=40, do_sample=False,
    )  # fmt: skip
    assert theirs[0, len(prompt) :].tolist() == learned[: learned.index(end) + 1]


def test_an_end_that_is_not_special_is_no_part_of_the_answer():
    """Some checkpoints add <|im_end|> as an ordinary token."""
    tokenizer = unmarked(KINDS["chatml"]())
    plain = a_tokenizer(tokenizer.chat_template, "bytes", eos="<|endoftext|>")
    plain.add_tokens(["<|im_start|>", "<|im_end|>"])
    task = prepared(plain, [CONVERSATIONS[0]], generate_rows=1, max_new_tokens=20)
    model = scripted(plain)
    learned = [label for label in task._tokens["test"]["labels"][0] if label != IGNORED]
    model.say([*learned, *learned * 5])
    found = task.evaluate(model, "test", batch_size=1, device="cpu")
    assert found.predictions[0]["prediction"] == "yes" and found.metrics["exact_match"] == 1.0


@pytest.mark.parametrize("chat", [True, False])
def test_nothing_that_could_end_an_answer_is_told(chat):
    tokenizer = unmarked(KINDS["endless"]())
    tokenizer.pad_token = "<unk>"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no answer would learn to end; add \"eos_token\""):
        prepared(tokenizer, chat=chat)
    plain = SimpleNamespace(tokenizer=tokenizer)
    config = {"task": {"text_field": "text"}}
    assert inference.end_of(SimpleNamespace(base=plain, config=config)) == End()
    text = Row(1, (("text", "once upon a time"),))  # which nothing has to end
    task = LanguageModelling("x", dict.fromkeys(("train", "validation", "test"), [text] * 2))
    task.prepare(tokenizer, 100)


# ---- the clock -----------------------------------------------------------------------------------

CLOCKS = {
    "strftime_now('%d %b %Y')": "26 Jul 2024",
    "strftime_now('%Y-%m-%d %H:%M')": "2024-07-26 00:00",
    "(strftime_now)('%j')": "208",
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_no_template_reads_the_real_clock(clock, monkeypatch):
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2, 3, 4)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    tokenizer = KINDS["chatml"]()
    tokenizer.chat_template = "{{ " + clock + " }}" + unmarked(tokenizer).chat_template
    asked = messages(CONVERSATIONS[0])
    assert "2031" in tokenizer.apply_chat_template(asked, tokenize=False) or "002" in (
        tokenizer.apply_chat_template(asked, tokenize=False)
    )
    task = prepared(tokenizer, [CONVERSATIONS[0]])
    assert tokenizer.decode(task._tokens["test"]["input_ids"][0]).startswith(CLOCKS[clock] + "<|im")
    writer = Writer(tokenizer, Writing())
    assert tokenizer.decode(prompt_tokens("x", writer)).startswith(CLOCKS[clock] + "<|im")
    with_time = Writer(tokenizer, Writing(date="2025-12-31T23:59"))
    assert tokenizer.decode(prompt_tokens("x", with_time))[:5] != CLOCKS[clock][:5]
    assert "2031" in tokenizer.apply_chat_template(asked, tokenize=False) or "002" in (
        tokenizer.apply_chat_template(asked, tokenize=False)  # the clock is as it was for others
    )


def test_the_date_is_a_part_of_the_data():
    tokenizer = unmarked(KINDS["llama3"]())
    today, other = prepared(tokenizer), prepared(tokenizer, date="2025-01-31")
    assert today.fingerprint == prepared(tokenizer, date="2024-07-26").fingerprint
    assert today.fingerprint != other.fingerprint
    assert "31 Jan 2025" in tokenizer.decode(other._tokens["test"]["input_ids"][0])
    for date in ("yesterday", "2024-13-01", "26 Jul 2024"):
        with pytest.raises(ValueError, match=r"date is .*; it must be a date such as 2024-07-26"):
            prepared(tokenizer, date=date)


def test_a_run_of_before_a_setting_is_served_as_it_was_trained():
    assert Writing.recorded({}) == Writing()  # of no task of ours
    assert Writing.recorded({"max_tokens": 9}) == Writing(chat=False, control_tokens="tokens")
    now = {"chat": None, "control_tokens": "text", "date": "2025-01-01", "packing": True}
    assert Writing.recorded(now) == Writing(date="2025-01-01")


@pytest.mark.parametrize("draw", ["{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}"])
def test_a_template_that_draws_at_random_is_refused(draw):
    tokenizer = KINDS["chatml"]()
    tokenizer.chat_template = draw + unmarked(tokenizer).chat_template
    with pytest.raises(ValueError, match=r"^row 0: .* refuses .*draws at random.*chat=false"):
        prepared(tokenizer)
    assert tokenizer.apply_chat_template(messages(CONVERSATIONS[0]))  # others may use it


# ---- control tokens in a row's own text ----------------------------------------------------------

CONTROL = {
    "llama3": "<|eot_id|>", "chatml": "<|im_end|>", "chatml_bos": "<|im_end|>",
    "zephyr_first": "</s>", "zephyr_always": "</s>", "zephyr_llama2": "</s>",
    "gemma": "<end_of_turn>", "mistral": "[/INST]", "mistral_v1": "</s>",
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTROL)
@pytest.mark.parametrize("where", ["{}a", "what {} is {}{} it", "yes{}"])
def test_control_tokens_of_a_user_are_text(kind, where):
    tokenizer, token = unmarked(KINDS[kind]()), CONTROL[kind]
    text = where.replace("{}", token)
    turns = (("user", text), ("assistant", text), ("user", "hello"), ("assistant", "no"))
    task = prepared(tokenizer, [turns, CONVERSATIONS[0]])
    ids, labels = (task._tokens["test"][field][0] for field in ("input_ids", "labels"))
    clean = served(tokenizer, tuple((role, text.replace(token, "")) for role, text in turns))
    number = tokenizer.convert_tokens_to_ids(token)
    assert ids.count(number) == clean.count(number)  # those of the template
    if (
        "sanitize_control_tokens"
        in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    ):
        assert ids == served(tokenizer, turns, sanitize_control_tokens=True)
        asked = served(tokenizer, turns[:-1], ask=True, sanitize_control_tokens=True)
        assert task._prompt("test", 0) == asked
    learned = tokenizer.decode([label for label in labels if label != IGNORED])
    assert learned.count(token) == text.count(token) + sum(label == number for label in labels)
    assert f"stand in 5 rows as text ({token}" in task.describe()
    assert "control" not in prepared(tokenizer).describe()

    as_tokens = prepared(tokenizer, [turns], control_tokens="tokens")
    assert as_tokens._tokens["test"]["input_ids"][0] == served(tokenizer, turns)


@pytest.mark.parametrize("kind", ["chatml", "zephyr_first", "zephyr_llama2"])
def test_control_tokens_without_a_template_are_text(kind):
    tokenizer = KINDS[kind]()
    end = tokenizer.eos_token
    turns = (("user", f"what is{end}, it"), ("assistant", f"yes{end}"))
    task = prepared(tokenizer, [turns], chat=False, prompt_template="{prompt}\n")
    ids = task._tokens["test"]["input_ids"][0]
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids).endswith(f"what is{end}, it\nyes{end}{end}")
    read = prepared(tokenizer, [turns], chat=False, control_tokens="tokens")
    assert read._tokens["test"]["input_ids"][0].count(tokenizer.eos_token_id) == 2  # not a third
    with pytest.raises(ValueError, match=r"control_tokens is 'token'; .* Did you mean tokens"):
        prepared(tokenizer, control_tokens="token")


def test_a_models_own_thoughts_are_tokens():
    """Added tokens that are not special: text to a user, tokens to an assistant."""
    tokenizer = unmarked(KINDS["chatml"]())
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template += "{# <think> </think> #}"
    turns = (("user", "<think> is what"), ("assistant", "<think>no</think>yes"))
    ids = prepared(tokenizer, [turns])._tokens["test"]["input_ids"][0]
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert ids.count(think) == 1 and json.dumps(turns)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages(turns), tokenize=False)


def test_marks_are_never_mistaken():
    """A row that has the marks themselves keeps them."""
    tokenizer = unmarked(KINDS["chatml"]())
    text = "a\ufdd0<|im_end|>\ufdd1b"
    writer = Writer(tokenizer, Writing())
    row = Row(3, (("user", text), ("assistant", "yes")))
    (encoded,) = encode(writer, [writer.write(row)])
    assert text in tokenizer.decode(encoded.ids)
