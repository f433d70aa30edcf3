"""What every language-modelling task shares: rows of turns, tokens, batches, loss, generation.

A row is a text in turns, some of which are learned: a prompt and its completion, a conversation in
which the assistant speaks, or a text without either. The loss is the mean of -log p over the
learned tokens, each predicted from what stands before it. A concrete task reads rows and hands them
over; one whose answers can be right or wrong says when they are.

Turns are tokenised one by one and joined, so that what a model is given to answer is, token for
token, what it was trained to go on from.

Shapes: b rows of a batch, t tokens (padded), n learned tokens, h hidden size, v vocabulary.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness import forgetting
from harness.evaluation import Evaluation, evaluating
from harness.tasks import token_cache
from harness.tasks.base import SPLITS, Batch
from harness.tasks.classification import MAX_SIGNAL_FRAC, epoch_order
from harness.tasks.generation import generate
from variants.checks import check_positive, check_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from harness.models.base import BaseModel

IGNORED = -100  # as a label: not learned
LEARNED = ("assistant", "text")  # the roles whose turns are learned
HEAD_TOKENS = 1024  # whose logits (n, v) are held at a time
MAX_LOST_FRAC = 0.1  # of a split's rows, for which max_tokens leaves nothing to learn


@dataclass(frozen=True, slots=True)
class Row:
    """One example. `id` is unique in its split and names the row in predictions.

    Args:
        turns: (role, text) with roles system, user and assistant in the order of a conversation,
            or a single ("text", ...).
    """

    id: int
    turns: tuple[tuple[str, str], ...]

    @property
    def answer(self) -> str:
        """The last turn, which generation is compared with."""
        return self.turns[-1][1]


def render(
    row: Row, tokenizer: "PreTrainedTokenizerBase", *, chat: bool, prompt_template: str
) -> list[tuple[str, bool]]:
    """The row as pieces of text, each learned or not.

    Args:
        chat: write the turns as the tokenizer's chat template has them; else a user's turn is put
            into `prompt_template` and the others stand as they are.

    Raises ValueError if the template refuses the row, or does not write a conversation piece after
    piece.
    """
    if not chat or row.turns[0][0] == "text":
        return [
            (prompt_template.replace("{prompt}", text) if role == "user" else text, role in LEARNED)
            for role, text in row.turns
        ]
    messages = [{"role": role, "content": text} for role, text in row.turns]

    def written(count: int, *, ask: bool) -> str:
        """The first messages, and with `ask` how the assistant's next turn begins."""
        try:
            text = tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=ask
            )
        except TemplateError as error:  # such as "roles must alternate"
            raise ValueError(
                f"row {row.id}: the tokenizer's chat template refuses the conversation ({error}); "
                "change it, or set task.chat=false."
            ) from error
        assert isinstance(text, str)
        return text

    pieces, done = [], ""
    for index, (role, _) in enumerate(row.turns):
        if role != "assistant":
            continue
        for text, learned in (
            (written(index, ask=True), False),
            (written(index + 1, ask=False), True),
        ):
            if not text.startswith(done):
                raise ValueError(
                    "the tokenizer's chat template does not write a conversation turn after turn, "
                    "so that its answers cannot be told from the rest; set task.chat=false."
                )
            pieces.append((text[len(done) :], learned))
            done = text
    return pieces


def prompt_tokens(
    text: str, tokenizer: "PreTrainedTokenizerBase", *, chat: bool | None, prompt_template: str
) -> list[int]:
    """What a model is given to answer `text`, written and tokenised as in training; see
    `LanguageModelling` for `chat`."""
    if chat is None:
        chat = getattr(tokenizer, "chat_template", None) is not None
    row = Row(0, (("user", text), ("assistant", "")))
    pieces = render(row, tokenizer, chat=chat, prompt_template=prompt_template)
    start = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
    return [*start, *tokenizer(pieces[0][0], add_special_tokens=False)["input_ids"]]


def token_losses(model: "PreTrainedModel", batch: Batch, *, chunked: bool = True) -> Tensor:
    """-log p of every learned token (n,) in nats, float32, row after row.

    With `chunked` the logits of HEAD_TOKENS tokens are held at a time, and computed again in the
    backward pass: those of a long batch over a large vocabulary would be most of all memory.
    """
    learned = batch.labels[:, 1:] != IGNORED  # b t-1
    gold = batch.labels[:, 1:][learned]  # n
    if not chunked:
        logits = model(**batch.inputs, use_cache=False).logits[:, :-1][learned]  # n v
        return F.cross_entropy(logits.float(), gold, reduction="none")
    hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state  # b t h
    head = model.get_output_embeddings()

    def losses(states: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), tokens, reduction="none")

    pieces = zip(hidden[:, :-1][learned].split(HEAD_TOKENS), gold.split(HEAD_TOKENS), strict=True)
    return torch.cat([checkpoint(losses, h, g, use_reentrant=False) for h, g in pieces])


class LanguageModelling:
    """A `harness.tasks.base.Task` over rows of text, of which some turns are learned.

    Args:
        name: as in conf/task/.
        rows: train, validation and test.
        signal_rows: how many rows of train to withhold as the split `signal`, at most 5 % of
            train: those with the smallest sha256 of their text, the same for every seed.
        max_tokens: the length at which rows are cut.
        loss_on: learn the answers' tokens, or all but the first.
        chat: write turns with the tokenizer's chat template; None: if it has one.
        prompt_template: how a prompt is written without a chat template.
        packing: join rows to sequences of up to max_tokens, none of which sees another; a batch
            then holds so many sequences.
        generate_rows: how many rows of validation and test to answer by greedy generation, of
            those that were not cut the ones with the smallest sha256; 0 for none.
        max_new_tokens: the longest answer.
        stop: strings that end an answer, beside the end of text.
        held_out_text: file of the text on which forgetting is measured, None for the one of
            `harness.forgetting`; held_out_tokens: how much of it, 0 for none.
        eval_rows: how many rows of validation and test to keep, those with the smallest sha256;
            None for all.
        notes: sentences for `describe`.

    Attributes:
        truncated_rows: rows per split that `prepare` cut.
        lost_rows: rows per split of which nothing learned was left; they are dropped.
    """

    labels: None = None

    def __init__(
        self,
        name: str,
        rows: Mapping[str, Sequence[Row]],
        *,
        signal_rows: int = 256,
        max_tokens: int = 512,
        loss_on: Literal["completion", "all"] = "completion",
        chat: bool | None = None,
        prompt_template: str = "{prompt}",
        packing: bool = False,
        generate_rows: int = 0,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        held_out_text: str | None = None,
        held_out_tokens: int = 512,
        eval_rows: int | None = None,
        notes: Sequence[str] = (),
    ):
        for key, value in (
            ("signal_rows", signal_rows),
            ("generate_rows", generate_rows),
            ("held_out_tokens", held_out_tokens),
        ):
            check_type(key, value, int)
            check_positive(key, value, or_zero=True)
        for key, value in (("max_tokens", max_tokens), ("max_new_tokens", max_new_tokens)):
            check_type(key, value, int)
            check_positive(key, value)
        check_type("eval_rows", eval_rows, int | None)
        if eval_rows is not None:
            check_positive("eval_rows", eval_rows)
        if loss_on not in ("completion", "all"):
            raise ValueError(f"loss_on is {loss_on!r}; it must be completion or all.")
        check_type("chat", chat, bool | None)
        check_type("packing", packing, bool)
        check_type("prompt_template", prompt_template, str)
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop is {stop!r}; it must be a list of texts, none of them empty.")
        if "{prompt}" not in prompt_template:
            raise ValueError(f"prompt_template is {prompt_template!r}; it must contain {{prompt}}.")
        self.name, self.max_tokens, self.loss_on = name, max_tokens, loss_on
        self.chat, self.prompt_template, self.packing = chat, prompt_template, packing
        self.generate_rows, self.max_new_tokens = generate_rows, max_new_tokens
        self.stop, self.notes = tuple(stop), tuple(notes)
        self.held_out_tokens = held_out_tokens
        self.held_out = forgetting.read_text(held_out_text) if held_out_tokens else ""
        train = list(rows["train"])
        withheld = set(_smallest(train, min(signal_rows, int(MAX_SIGNAL_FRAC * len(train)))))
        self.rows: dict[str, list[Row]] = {
            "train": [row for i, row in enumerate(train) if i not in withheld],
            "signal": [train[i] for i in sorted(withheld)],
        }
        for split in ("validation", "test"):
            count = len(rows[split]) if eval_rows is None else eval_rows
            self.rows[split] = [rows[split][i] for i in sorted(_smallest(rows[split], count))]
        self._given = dict(self.rows)
        digest = hashlib.sha256()
        for split in SPLITS:
            for row in self.rows[split]:
                digest.update(json.dumps([split, row.id, row.turns]).encode() + b"\n")
        digest.update(self.held_out.encode())
        self.fingerprint = digest.hexdigest()
        trained = {row.turns for row in train}
        self.leaked_rows = sum(row.turns in trained for row in self.rows["test"])
        self.truncated_rows: dict[str, int] = {}
        self.lost_rows: dict[str, int] = {}
        self._tokens: dict[str, dict[str, list[list[int]]]] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._chunked: bool | None = None  # until the model's head has been looked at

    @property
    def primary_metric(self) -> str:
        return "exact_match" if self.generate_rows else "loss_nats"

    @property
    def counts(self) -> dict[str, int]:
        return {split: len(self.rows[split]) for split in SPLITS}

    # ---- what a concrete task may say ------------------------------------------------------------

    def score(self, answer: str, row: Row) -> dict[str, Any]:
        """Whether a generated answer is right, as {"correct": bool}, and what else is counted."""
        return {"correct": answer.strip() == row.answer.strip()}

    def summarise(self, scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Metrics of the answers, from what `score` gave for each."""
        return {"exact_match": sum(score["correct"] for score in scores) / len(scores)}

    # ---- tokens ----------------------------------------------------------------------------------

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> None:
        """Tokenise every split once, cutting rows at `max_tokens`; what an earlier process has
        tokenised is read from `harness.tasks.token_cache`.

        Raises ValueError if the tokenizer has no padding token or no chat template where one is
        asked for, or if `max_tokens` leaves nothing to learn of more than a tenth of a split.
        """
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no padding token, which batches need: "
                "set tokenizer.pad_token."
            )
        self.rows = dict(self._given)  # of which an earlier call may have dropped some
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if self.chat and not has_template:
            raise ValueError("task.chat is true, but the tokenizer has no chat template.")
        self.uses_chat = has_template if self.chat is None else self.chat
        settings = [self.loss_on, self.uses_chat, self.prompt_template, tokenizer.eos_token]
        if self.uses_chat:
            settings.append(str(tokenizer.chat_template))
        data = hashlib.sha256(json.dumps([self.fingerprint, settings]).encode()).hexdigest()
        file = token_cache.cache_file(data, tokenizer, max_tokens)
        cached = token_cache.load(file)
        if cached is None:
            cached = self._tokenise(tokenizer, max_tokens)
            token_cache.save(file, *cached)
        self._tokens, self.truncated_rows = cached
        self._tokenizer, self._limit = tokenizer, max_tokens
        self._drop_lost(max_tokens)

    def _tokenise(
        self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int
    ) -> tuple[token_cache.Tokens, dict[str, int]]:
        """Every split's tokens with their labels, and how many rows of each were cut."""
        start = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
        tokens: token_cache.Tokens = {}
        cut = {}
        for split in SPLITS:
            pieces = [
                render(row, tokenizer, chat=self.uses_chat, prompt_template=self.prompt_template)
                for row in self.rows[split]
            ]
            flat = [text for row in pieces for text, _ in row]
            ids = iter(tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
            tokens[split] = {"input_ids": [], "labels": []}
            cut[split] = 0
            for row in pieces:
                inputs, labels = list(start), [IGNORED] * len(start)
                for _, learned in row:
                    piece = next(ids)
                    inputs += piece
                    labels += piece if learned or self.loss_on == "all" else [IGNORED] * len(piece)
                if not self.uses_chat and tokenizer.eos_token_id is not None:
                    inputs.append(tokenizer.eos_token_id)  # a chat template has its own end
                    labels.append(tokenizer.eos_token_id)
                cut[split] += len(inputs) > max_tokens
                tokens[split]["input_ids"].append(inputs[:max_tokens])
                tokens[split]["labels"].append(labels[:max_tokens])
        return tokens, cut

    def _drop_lost(self, max_tokens: int) -> None:
        """Leave out the rows that have nothing to learn after cutting."""
        for split in SPLITS:
            fields = self._tokens[split]
            kept = [
                i for i, row in enumerate(fields["labels"]) if any(x != IGNORED for x in row[1:])
            ]
            lost = len(self.rows[split]) - len(kept)
            self.lost_rows[split] = lost
            if lost > MAX_LOST_FRAC * len(self.rows[split]):
                raise ValueError(
                    f"max_tokens is {max_tokens}, which leaves nothing to learn of {lost} of the "
                    f"{len(self.rows[split])} {split} rows: their prompts are longer."
                )
            if lost:
                self.rows[split] = [self.rows[split][i] for i in kept]
                self._tokens[split] = {k: [rows[i] for i in kept] for k, rows in fields.items()}

    # ---- training --------------------------------------------------------------------------------

    def train_batches(self, *, seed: int, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """Endless batches of train from the `start`-th on; see `classification.epoch_order`.

        Raises ValueError if batch_size < 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        self._prepared()
        return self._batches_from(start, seed, batch_size)

    def _batches_from(self, start: int, seed: int, batch_size: int) -> Iterator[Batch]:
        epoch = 0
        while True:
            batches = self._epoch(seed, batch_size, epoch)
            if start < len(batches):
                for sequences in batches[start:]:
                    yield self._batch("train", sequences)
            start, epoch = max(0, start - len(batches)), epoch + 1

    def _epoch(self, seed: int, batch_size: int, epoch: int) -> list[list[list[int]]]:
        """The batches of an epoch; each a list of sequences, each a list of row positions."""
        lengths = [len(ids) for ids in self._tokens["train"]["input_ids"]]
        if not self.packing:
            order = epoch_order(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
            return [[[i] for i in positions.tolist()] for positions in order]
        shuffled = epoch_order([0] * len(lengths), batch_size=1, seed=seed, epoch=epoch)
        sequences: list[list[int]] = []
        room = 0
        for i in (int(position) for position in shuffled):
            if lengths[i] > room:
                sequences.append([])
                room = self._limit
            sequences[-1].append(i)
            room -= lengths[i]
        whole = max(1, len(sequences) // batch_size)  # what is left over waits for another epoch
        return [sequences[n * batch_size : (n + 1) * batch_size] for n in range(whole)]

    def _batch(self, split: str, sequences: Sequence[Sequence[int]]) -> Batch:
        """Sequences of rows, padded on the right. Packed rows start at position 0 each, which is
        how transformers is told to keep them apart; then there is no attention mask."""
        tokenizer, tokens = self._prepared(), self._tokens[split]
        lengths = [sum(len(tokens["input_ids"][i]) for i in rows) for rows in sequences]
        longest = max(lengths)

        def padded(values: list[list[int]], fill: int) -> Tensor:  # b t
            return torch.tensor([row + [fill] * (longest - len(row)) for row in values])

        joined = {
            field: [[x for i in rows for x in tokens[field][i]] for rows in sequences]
            for field in ("input_ids", "labels")
        }
        assert tokenizer.pad_token_id is not None
        inputs = {"input_ids": padded(joined["input_ids"], tokenizer.pad_token_id)}
        labels = padded(joined["labels"], IGNORED)
        if any(len(rows) > 1 for rows in sequences):
            starts = [[len(tokens["input_ids"][i]) for i in rows] for rows in sequences]
            positions = [
                [x for length in (*row, longest - sum(row)) for x in range(length)]
                for row in starts
            ]
            inputs["position_ids"] = torch.tensor(positions)
            for index, row in enumerate(
                starts
            ):  # the last token of a row does not predict the next
                begin = 0
                for length in row:
                    labels[index, begin] = IGNORED
                    begin += length
        else:
            inputs["attention_mask"] = padded([[1] * length for length in lengths], 0)
        ids = tuple(self.rows[split][i].id for rows in sequences for i in rows)
        return Batch(inputs=inputs, labels=labels, rows=ids, n_tokens=sum(lengths))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean of -log p over the batch's learned tokens in nats, float32."""
        return self._losses(model, batch).mean()

    def _losses(self, model: Any, batch: Batch) -> Tensor:
        if self._chunked is None:
            self._chunked = _head_is_plain(model, batch)
        return token_losses(model, batch, chunked=self._chunked)

    # ---- evaluation ------------------------------------------------------------------------------

    def evaluate(
        self, model: nn.Module, split: str, *, batch_size: int, device: torch.device | str
    ) -> Evaluation:
        """loss_nats and perplexity over the split's learned tokens, and what `summarise` makes of
        the generated answers; predictions in the order of the split.

        Raises ValueError on a split that does not exist or has no rows.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {SPLITS}.")
        if not self.rows[split]:
            raise ValueError(f"{self.name} has no rows in {split!r}: nothing to evaluate.")
        self._prepared()
        tokens = self._tokens[split]
        order = sorted(range(len(self.rows[split])), key=lambda i: -len(tokens["input_ids"][i]))
        predictions: list[dict[str, Any]] = [{} for _ in order]
        total = count = 0.0
        with evaluating(model):
            for first in range(0, len(order), batch_size):
                positions = order[first : first + batch_size]
                batch = self._batch(split, [[i] for i in positions]).to(device)
                losses = self._losses(model, batch).double()
                learned = (batch.labels[:, 1:] != IGNORED).sum(1).tolist()
                for i, row in zip(positions, losses.split(learned), strict=True):
                    total, count = total + float(row.sum()), count + len(row)
                    predictions[i] = {"row": self.rows[split][i].id, "loss_nats": float(row.mean()),
                                      "learned_tokens": len(row)}  # fmt: skip
        mean = total / count
        metrics: dict[str, float | int] = {
            "loss_nats": mean,
            "perplexity": math.exp(min(mean, 700.0)),
            "n": len(order),
        }
        if split in ("validation", "test") and self.generate_rows:
            metrics |= self._answer(model, split, predictions, batch_size, device)
        return Evaluation(metrics, predictions)

    def _answer(
        self,
        model: Any,
        split: str,
        predictions: list[dict[str, Any]],
        batch_size: int,
        device: torch.device | str,
    ) -> dict[str, float | int]:
        """Generate, score, and write both into `predictions`."""
        rows, lengths = self.rows[split], map(len, self._tokens[split]["input_ids"])
        whole = [i for i, length in enumerate(lengths) if length < self._limit]  # no answer is cut
        some = _smallest([rows[i] for i in whole], self.generate_rows)
        chosen = sorted(whole[i] for i in some)
        if not chosen:
            raise ValueError(
                f"every {split} row was cut at max_tokens, so there is none to answer."
            )
        prompts = [self._prompt(split, i) for i in chosen]
        with evaluating(model):
            answers = generate(
                model,
                self._prepared(),
                prompts,
                max_new_tokens=self.max_new_tokens,
                stop=self.stop,
                batch_size=batch_size,
                device=device,
            )
        scores = []
        for i, answer in zip(chosen, answers, strict=True):
            scores.append(self.score(answer, rows[i]))
            predictions[i] |= {"label": rows[i].answer, "prediction": answer, **scores[-1]}
        return {**self.summarise(scores), "generated": len(chosen)}

    def _prompt(self, split: str, i: int) -> list[int]:
        """The tokens before the last learned turn."""
        ids, labels = self._tokens[split]["input_ids"][i], self._tokens[split]["labels"][i]
        pieces = render(
            self.rows[split][i], self._prepared(), chat=self.uses_chat,
            prompt_template=self.prompt_template,
        )  # fmt: skip
        if self.loss_on == "completion":
            last = max(k for k, label in enumerate(labels) if label == IGNORED)
            return ids[: last + 1]
        prompt = "".join(text for text, _ in pieces[:-1])
        start = ids[:1] if _adds_bos(self._prepared()) else []
        return [*start, *self._prepared()(prompt, add_special_tokens=False)["input_ids"]]

    def remember(self, base: "BaseModel") -> "forgetting.Reference | None":
        """What the base says of the held-out text."""
        if not self.held_out_tokens:
            return None
        return forgetting.Reference(base.model, base.tokenizer, self.held_out, self.held_out_tokens)

    # ---- for people ------------------------------------------------------------------------------

    def texts(self, split: str) -> list[str]:
        """The rows of a split without their answers, in the order of `evaluate`'s predictions."""
        return [
            "\n".join(text for _, text in row.turns[:-1]) or row.answer for row in self.rows[split]
        ]

    def example(self) -> str:
        """The first training row: its tokens as the model sees them, in brackets those learned."""
        tokenizer, tokens = self._prepared(), self._tokens["train"]
        ids, labels = tokens["input_ids"][0], tokens["labels"][0]
        names = tokenizer.convert_ids_to_tokens(ids)
        shown = [
            name if label == IGNORED else f"[{name}]"
            for name, label in zip(names, labels, strict=True)
        ]
        learned = sum(label != IGNORED for label in labels)
        return "\n".join(
            [
                f"text    {tokenizer.decode(ids)!r}",
                f"tokens  {' '.join(shown)}",
                f"ids     {' '.join(map(str, ids))}",
                f"        {learned} of {len(ids)} tokens are learned, those in brackets",
            ]
        )

    def describe(self) -> str:
        """Rows per split, and what a reader should know: cut, dropped and leaked rows."""
        parts = [f"{count:,} {split}" for split, count in self.counts.items()]
        sentences = [f"{self.name}: {', '.join(parts)} rows", *self.notes]
        if cut := sum(self.truncated_rows.values()):
            sentences.append(f"{cut:,} rows were cut to fit")
        if lost := sum(self.lost_rows.values()):
            sentences.append(f"{lost:,} rows were dropped, since their prompts fill max_tokens")
        if self.leaked_rows:
            sentences.append(f"{self.leaked_rows:,} test rows also occur in train")
        return "; ".join(sentences)

    def _prepared(self) -> "PreTrainedTokenizerBase":
        if self._tokenizer is None:
            raise RuntimeError(
                f"{self.name} is not tokenised: call prepare(tokenizer, max_tokens)."
            )
        return self._tokenizer


def _smallest(rows: Sequence[Row], count: int) -> list[int]:
    """Positions of the `count` rows with the smallest sha256 of their text."""
    digests = [hashlib.sha256(json.dumps(row.turns).encode()).digest() for row in rows]
    return sorted(range(len(rows)), key=lambda i: (digests[i], i))[:count]


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]


@torch.no_grad()
def _head_is_plain(model: Any, batch: Batch) -> bool:
    """Whether the logits are the output embedding of the last hidden state, and nothing more: some
    architectures scale or cap them."""
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    inputs = {name: tensor[:1] for name, tensor in batch.inputs.items()}
    training = model.training
    with evaluating(model):
        ours = head(model.base_model(**inputs, use_cache=False).last_hidden_state).float()
        theirs = model(**inputs, use_cache=False).logits.float()
    assert model.training == training
    return torch.equal(ours, theirs)
