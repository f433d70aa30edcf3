"""Language modelling: what is learned, packing, generation; against loops written out by hand."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
)

from harness.loop import facts
from harness.models import tiny
from harness.tasks.generation import generate, pinned_config
from harness.tasks.language import IGNORED, LanguageModelling, token_losses
from harness.tasks.packing import pack
from harness.tasks.turns import Row, Writer, Writing

ROWS = [
    ("what is it", " a cat"),
    ("who", " the dog of the house"),
    ("a much longer question about nothing in particular, is it?", " no"),
    ("why", " because"),
    ("x", " y"),
]
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def rows(count, pairs=ROWS):
    return [
        Row(
            i,
            (("user", f"{pairs[i % len(pairs)][0]} {i}"), ("assistant", pairs[i % len(pairs)][1])),
        )
        for i in range(count)
    ]


def task_of(count=25, **settings):
    data = {"train": rows(count), "validation": rows(7), "test": rows(6)}
    settings = {"max_tokens": 100, "signal_rows": 1} | settings
    return LanguageModelling("made_up", data, **settings)


@pytest.fixture
def tokenizer():
    return tiny.byte_tokenizer("llama")


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.tiny_config("llama", len(tokenizer)))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.eval()


def by_hand(model, tokenizer, prompt, answer, *, everything=False):
    """[-log p] of each learned token, from one unpadded row and a loop over its tokens."""
    prompt_ids = [tokenizer.bos_token_id] + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    answer_ids = [*answer_ids, tokenizer.eos_token_id]
    ids = prompt_ids + answer_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    found = []
    for position in range(1, len(ids)):
        if everything or position >= len(prompt_ids):
            row = logits[position - 1]
            found.append(float(torch.logsumexp(row, 0) - row[ids[position]]))
    return found


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_what_is_learned_and_from_where(model, tokenizer, loss_on):
    task = task_of(loss_on=loss_on)
    task.prepare(tokenizer, 100)
    found = task.evaluate(model, "test", batch_size=4, device="cpu")
    expected = [
        by_hand(model, tokenizer, row.turns[0][1], row.answer, everything=loss_on == "all")
        for row in task.rows["test"]
    ]
    flat = [x for row in expected for x in row]
    assert found.metrics["loss_nats"] == pytest.approx(sum(flat) / len(flat), rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-5)
    for prediction, row in zip(found.predictions, expected, strict=True):
        assert prediction["learned_tokens"] == len(row)
        assert prediction["loss_nats"] == pytest.approx(sum(row) / len(row), rel=1e-5)
    assert found.metrics["n"] == 6 and "exact_match" not in found.metrics


def test_the_training_loss_is_the_mean_over_learned_tokens(model, tokenizer):
    task = task_of()
    task.prepare(tokenizer, 100)
    batch = next(task.train_batches(seed=0, batch_size=5))
    by_id = {row.id: row for row in task.rows["train"]}
    flat = [
        x
        for i in batch.rows
        for x in by_hand(model, tokenizer, by_id[i].turns[0][1], by_id[i].answer)
    ]
    assert task.loss(model, batch).item() == pytest.approx(sum(flat) / len(flat), rel=1e-5)
    assert int((batch.labels != IGNORED).sum()) == len(flat)


@pytest.mark.parametrize("head_tokens", [1, 7, 1024])
def test_the_loss_in_pieces_is_the_loss(model, tokenizer, monkeypatch, head_tokens):
    monkeypatch.setattr("harness.tasks.language.HEAD_TOKENS", head_tokens)
    task = task_of()
    task.prepare(tokenizer, 100)
    batch = next(task.train_batches(seed=1, batch_size=6))
    gradients = []
    for chunked in (True, False):
        model.zero_grad()
        token_losses(model, batch, chunked=chunked).mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_head_that_caps_its_logits_is_not_gone_around(tokenizer):
    from transformers import Gemma2Config

    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=36, intermediate_size=67, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=10, final_logit_softcapping=0.5,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    task = task_of()
    task.prepare(tokenizer, 100)
    batch = next(task.train_batches(seed=0, batch_size=3))
    found = task.loss(model, batch).item()
    expected = token_losses(model, batch, chunked=False).mean().item()
    assert found == pytest.approx(expected) and task._chunked is False
    assert abs(token_losses(model, batch).mean().item() - expected) > 1e-4


@pytest.mark.parametrize("max_tokens", [72, 90, 400])
def test_packed_rows_do_not_see_each_other(model, tokenizer, max_tokens):
    task = task_of(packing=True, max_tokens=max_tokens)
    task.prepare(tokenizer, max_tokens)
    by_id = {row.id: row for row in task.rows["train"]}
    seen = []
    for batch, _ in zip(task.train_batches(seed=0, batch_size=2), range(3), strict=False):
        assert batch.inputs["input_ids"].shape[1] <= max_tokens
        flat = [
            x
            for i in batch.rows
            for x in by_hand(model, tokenizer, by_id[i].turns[0][1], by_id[i].answer)
        ]
        found = token_losses(model, batch)
        assert found.tolist() == pytest.approx(flat, rel=1e-4, abs=1e-5)
        seen += batch.rows
    assert len(set(seen)) > 8


def test_the_mask_hides_what_pads_and_nothing_else(tokenizer):
    task = task_of()
    task.prepare(tokenizer, 100)
    batch = next(task.train_batches(seed=0, batch_size=4))
    mask = batch.inputs["attention_mask"]
    assert mask.sum() == batch.n_tokens < mask.numel()
    assert (batch.inputs["input_ids"][mask == 0] == tokenizer.pad_token_id).all()
    assert (batch.labels[mask == 0] == IGNORED).all()


def test_a_sequence_is_filled_to_the_last_token():
    assert pack([0, 1, 2, 3], [4, 6, 10, 1], 10) == [[0, 1], [2], [3]]
    assert pack([3, 1, 0], [4, 6, 10, 1], 10) == [[3, 1], [0]]


def test_nothing_predicts_the_first_token_of_a_packed_row(model, tokenizer):
    """All tokens are learned and none begins the text: the first of a row is no exception."""
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer._bos_token = tokenizer.bos_token = None
    task = task_of(packing=True, max_tokens=90, loss_on="all")
    task.prepare(tokenizer, 90)
    batch = next(task.train_batches(seed=0, batch_size=2))
    by_id = {row.id: row for row in task.rows["train"]}
    flat = []
    for i in batch.rows:
        text = by_id[i].turns[0][1] + by_id[i].answer
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        flat += [-float(logits[at - 1, ids[at]]) for at in range(1, len(ids))]
    assert len(batch.rows) > 2
    assert token_losses(model, batch).tolist() == pytest.approx(flat, rel=1e-4, abs=1e-5)


def test_evaluation_draws_nothing_from_the_global_generator(model, tokenizer):
    task = task_of(generate_rows=4, max_new_tokens=5)
    task.prepare(tokenizer, 100)
    model.generation_config = GenerationConfig(do_sample=True, temperature=2.0)
    before = torch.get_rng_state()
    for split in ("validation", "test", "signal"):
        task.evaluate(model, split, batch_size=2, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_resume_where_they_were(tokenizer):
    for packing in (False, True):
        task = task_of(packing=packing)
        task.prepare(tokenizer, 100)
        batches = task.train_batches(seed=3, batch_size=2)
        first = [next(batches).rows for _ in range(30)]
        later = task.train_batches(seed=3, batch_size=2, start=17)
        assert [next(later).rows for _ in range(13)] == first[17:]
        epoch = [i for batch in task._epoch(3, 2, 0) for sequence in batch for i in sequence]
        assert len(set(epoch)) == len(epoch) > 18  # each row at most once


# ---- chat ----------------------------------------------------------------------------------------


def pieces_of(row, tokenizer, **writing):
    return list(Writer(tokenizer, Writing(**writing)).write(row).pieces)


def test_a_conversation_is_learned_where_the_assistant_speaks(tokenizer):
    tokenizer.chat_template = CHATML
    turns = (("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "and?"),
             ("assistant", "bye"))  # fmt: skip
    row = Row(1, turns)
    pieces = pieces_of(row, tokenizer)
    assert pieces == [
        ("<system>be kind</>\n<user>hi</>\n<assistant>", False),
        ("hello</>\n", True),
        ("<user>and?</>\n<assistant>", False),
        ("bye</>\n", True),
    ]
    whole = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], tokenize=False
    )
    assert "".join(text for text, _ in pieces) == whole
    task = LanguageModelling("chat", {"train": [row] * 30, "validation": [row], "test": [row]})
    task.prepare(tokenizer, 200)
    batch = next(task.train_batches(seed=0, batch_size=1))
    learned = batch.inputs["input_ids"][batch.labels != IGNORED]
    assert tokenizer.decode(learned) == "hello</>\nbye</>\n"
    asked = [{"role": role, "content": text} for role, text in turns[:-1]]
    served = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert task._prompt("test", 0) == served


def test_a_template_that_rewrites_what_was_said_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    row = Row(1, (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    with pytest.raises(ValueError, match=r"^row 1: .* turn after turn"):
        pieces_of(row, tokenizer)


def test_prompts_have_a_template_of_their_own(tokenizer):
    row = Row(1, (("user", "2+2"), ("assistant", "4")))
    pieces = pieces_of(row, tokenizer, chat=False, prompt_template="Q: {prompt}\nA: ")
    assert pieces == [("Q: 2+2\nA: ", False), ("4", True)]
    tokenizer.chat_template = CHATML
    assert pieces_of(Row(1, (("text", "once"),)), tokenizer) == [("once", True)]


# ---- generation ----------------------------------------------------------------------------------


def greedy_by_hand(model, tokenizer, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_answers_are_greedy_whatever_the_batch_and_the_models_own_settings(
    model, tokenizer, batch_size
):
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_p=0.9, repetition_penalty=3.0
    )
    prompts = [[1, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text, _ in ROWS]
    answers = generate(
        model, tokenizer, prompts, max_new_tokens=8, batch_size=batch_size, device="cpu"
    )
    assert answers == [greedy_by_hand(model, tokenizer, prompt, 8) for prompt in prompts]
    assert len(set(answers)) > 1
    assert model.generation_config.temperature == 5.0  # left as it was
    config = pinned_config(model, tokenizer, 8).to_dict()
    assert config["do_sample"] is False and config["repetition_penalty"] == 1.0


def test_an_answer_ends_before_a_stop_string(model, tokenizer):
    prompt = [1, *tokenizer("who", add_special_tokens=False)["input_ids"]]
    whole = greedy_by_hand(model, tokenizer, prompt, 12)
    stop = whole[3:5]
    (answer,) = generate(
        model, tokenizer, [prompt], max_new_tokens=12, stop=[stop], batch_size=1, device="cpu"
    )
    assert answer == whole[: whole.find(stop)] and stop


def test_generated_answers_are_scored(model, tokenizer):
    task = task_of(generate_rows=4, max_new_tokens=5)
    task.prepare(tokenizer, 100)
    before = task.evaluate(model, "test", batch_size=3, device="cpu")
    made = [p for p in before.predictions if "prediction" in p]
    assert len(made) == 4 == before.metrics["generated"] and task.primary_metric == "exact_match"
    prompts = {row.id: row.turns[0][1] for row in task.rows["test"]}
    for prediction in made:
        ids = [1, *tokenizer(prompts[prediction["row"]], add_special_tokens=False)["input_ids"]]
        assert prediction["prediction"] == greedy_by_hand(model, tokenizer, ids, 5)
    right = made[0]["row"]
    data = {"train": rows(25), "validation": rows(7)}
    data["test"] = [
        Row(r.id, (r.turns[0], ("assistant", made[0]["prediction"]))) if r.id == right else r
        for r in rows(6)
    ]
    again = LanguageModelling("made_up", data, signal_rows=1, generate_rows=6, max_new_tokens=5)
    again.prepare(tokenizer, 100)
    found = again.evaluate(model, "test", batch_size=2, device="cpu")
    assert found.metrics["exact_match"] == pytest.approx(1 / 6)
    assert [p["row"] for p in found.predictions if p["correct"]] == [right]
    signal = again.evaluate(model, "signal", batch_size=2, device="cpu")
    assert "exact_match" not in signal.metrics


# ---- what a user should know ---------------------------------------------------------------------


def test_how_answers_were_made_is_recorded_and_shown(model, tokenizer):
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.3, num_beams=3)
    task = task_of(generate_rows=3, max_new_tokens=5, stop=["\n", "?"])
    task.prepare(tokenizer, 100)
    found = task.evaluate(model, "test", batch_size=2, device="cpu")
    how = json.loads(json.dumps(found.generation))
    assert (how["do_sample"], how["num_beams"], how["max_new_tokens"]) == (False, 1, 5)
    assert how.get("temperature") in (None, 1.0) and how["repetition_penalty"] == 1.0
    assert how["stop"] == ["\n", "?"] and how["eos_token_id"] == [tokenizer.eos_token_id]
    samples = task.samples("test", found.predictions)
    rows = {row.id: row for row in task.rows["test"]}
    assert len(samples) == 3
    for sample in samples:
        row = rows[sample["row"]]
        assert sample["prompt"] == f"<s>{row.turns[0][1]}" and sample["expected"] == row.answer
        ids = tokenizer(row.turns[0][1], add_special_tokens=False)["input_ids"]
        (answer,) = generate(model, tokenizer, [[tokenizer.bos_token_id, *ids]], max_new_tokens=5,
                             stop=["\n", "?"], batch_size=1, device="cpu")  # fmt: skip
        assert sample["generated"] == answer and sample["correct"] == (answer == row.answer)
        assert list(sample) == ["row", "prompt", "generated", "expected", "correct"]
    assert task.evaluate(model, "signal", batch_size=2, device="cpu").generation is None
    assert task.metrics["perplexity"].chance == len(tokenizer) == 259


def test_cut_and_lost_rows_are_counted(tokenizer):
    task = task_of(max_tokens=40)
    with pytest.raises(ValueError, match=r"max_tokens is 40, which leaves nothing to learn of \d+"):
        task.prepare(tokenizer, 40)
    few = [*rows(19), Row(99, (("user", "q" * 90), ("assistant", "a")))]
    few = [row for row in few if len(row.turns[0][1]) < 40 or row.id == 99]
    task = LanguageModelling("x", {"train": few, "validation": rows(1), "test": rows(2)},
                             signal_rows=0, max_tokens=22)  # fmt: skip
    task.prepare(tokenizer, 22)
    assert facts.of_task(task)["rows"]["lost"]["train"] == 1
    assert task.lost_rows["train"] == 1 and task.counts["train"] == len(few) - 1
    assert "rows were cut to fit" in task.describe() and "1 rows were dropped" in task.describe()
    counts = task.counts
    task.prepare(tokenizer, 22)  # again
    assert task.counts == counts and len(task._tokens["train"]["labels"]) == counts["train"]


def test_rows_whose_answer_was_cut_are_not_generated(model, tokenizer, monkeypatch):
    monkeypatch.setattr("harness.tasks.language.MAX_LOST_FRAC", 1.0)
    task = task_of(generate_rows=6, max_new_tokens=2)
    lengths = [len(r.turns[0][1]) + len(r.answer.encode()) + 2 for r in task.rows["test"]]
    limit = sorted(lengths)[3]
    task = task_of(generate_rows=6, max_new_tokens=2, max_tokens=limit)
    task.rows["validation"] = task.rows["test"]
    for split in ("train", "signal"):
        task._given[split] = task._given["test"]
    task.prepare(tokenizer, limit)
    found = task.evaluate(model, "test", batch_size=3, device="cpu")
    answered = {p["row"] for p in found.predictions if "prediction" in p}
    assert answered == {
        r.id for r, n in zip(task._given["test"], lengths, strict=True) if n < limit
    }


def test_an_example_shows_what_is_learned(tokenizer):
    task = task_of()
    task.prepare(tokenizer, 100)
    shown = task.example()
    answer = task.rows["train"][0].answer
    count = len(answer.encode()) + 1
    assert f"{count} of " in shown and shown.count("[") >= count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be positive"),
        ({"loss_on": "prompt"}, "it must be completion or all"),
        ({"prompt_template": "Q:"}, "it must contain {prompt}"),
        ({"generate_rows": -1}, "generate_rows is -1"),
        ({"chat": 1}, "chat is 1"),
    ],
)
def test_wrong_settings_are_said(settings, message):
    with pytest.raises(ValueError, match=message):
        task_of(**settings)


def test_a_missing_template_or_padding_is_said(tokenizer):
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        task_of(chat=True).prepare(tokenizer, 100)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        task_of().prepare(tokenizer, 100)


# ---- what a base cannot do ----------------------------------------------------------------------


def base_of(model, tokenizer, positions=None):
    positions = positions or model.config.max_position_embeddings
    return SimpleNamespace(model=model, tokenizer=tokenizer, name="mine", max_tokens=positions)


def opt(tokenizer):
    """Learned positions, and no heed of where they restart."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 40, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=len(tokenizer), max_position_embeddings=64,
                       word_embed_proj_dim=32, **sizes)  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def mamba(tokenizer):
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2)
    return AutoModelForCausalLM.from_config(config).eval()


def mixtral(tokenizer, vocabulary=None):
    """A mixture of experts, whose products have shapes that depend on the row."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=vocabulary or len(tokenizer), **sizes, **heads)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_can_be_packed_is_taken(model, tokenizer, dtype):
    task = task_of(packing=True)
    task.prepare(tokenizer, 100)
    for base in (model, mixtral(tokenizer), mixtral(tokenizer, vocabulary=9)):
        task.check_base(base_of(base.to(dtype), tokenizer))
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    task.check_base(base_of(model, tokenizer))  # that is the loss's to say


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [opt, mamba])
def test_a_base_that_cannot_be_packed_is_told(tokenizer, make, dtype):
    task = task_of(packing=True)
    task.prepare(tokenizer, 100)
    other = make(tokenizer).to(dtype).train()
    with pytest.raises(ValueError, match=r"mine lets rows that are packed.*task\.packing=false"):
        task.check_base(base_of(other, tokenizer, 100))
    assert other.training
    task.packing = False
    task.check_base(base_of(other, tokenizer, 100))


def test_an_answer_that_the_base_has_no_positions_for_is_told(tokenizer):
    model = opt(tokenizer)
    task = task_of(generate_rows=5, max_new_tokens=61)
    task.prepare(tokenizer, 64)
    longest = max(len(task._prompt(split, i)) for split in ("validation", "test")
                  for i in task._to_answer(split))  # fmt: skip
    with pytest.raises(ValueError, match=rf"lower it to {64 - longest}, or task\.max_tokens"):
        task.check_base(base_of(model, tokenizer))
    task.max_new_tokens = 64 - longest
    task.check_base(base_of(model, tokenizer))
    found = task.evaluate(model, "test", batch_size=3, device="cpu")  # as many as there are
    assert found.metrics["generated"] == 5
