"""The common parts of language-modelling tasks: tokens, batches, loss, generation.

A row is a text in turns (turns.py), some of which are learned: a prompt and its completion, a
conversation in which the assistant speaks, or a text without either. The loss is the mean of -log p
over the learned tokens, each predicted from what stands before it. A concrete task reads rows and
hands them over; one whose answers can be right or wrong says when they are.

Shapes: b rows of a batch, t tokens (padded), n learned tokens, h hidden size, v vocabulary.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.models.mode import evaluating
from harness.tasks import forgetting, metrics, token_cache
from harness.tasks.batch import IGNORED, SPLITS, Batch, Evaluation
from harness.tasks.encoding import Encoded, encode
from harness.tasks.generation import generate, pinned_config, recorded
from harness.tasks.metrics import Metric
from harness.tasks.packing import pack, position_ids
from harness.tasks.rows import RowTask, by_length, check_counts, epoch_order, padded, smallest
from harness.tasks.turns import DATE, Row, Writer, Writing, control_sentence
from variants.settings import check_positive, check_type

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from harness.models.base import BaseModel

HEAD_TOKENS = 1024  # whose logits (n, v) are held at a time
ROWS_AT_A_TIME = 2000  # that are tokenised in one call
MAX_LOST_FRAC = 0.1  # of a split's rows, for which max_tokens leaves nothing to learn


def prompt_tokens(text: str, writer: Writer) -> list[int]:
    """The prompt to answer `text`, written and tokenised as in training."""
    return _asked(Row(0, (("user", text), ("assistant", ""))), writer)


def _asked(row: Row, writer: Writer) -> list[int]:
    """The part of a row that the model is given, to answer it."""
    (encoded,) = encode(writer, [writer.write(row, answered=False)], ending=False)
    return encoded.ids


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
    return head_losses(model.get_output_embeddings(), hidden[:, :-1][learned], gold)


def head_losses(head: nn.Module, states: Tensor, tokens: Tensor) -> Tensor:
    """-log p (n,) of each token from its state (n, h), the logits of HEAD_TOKENS at a time."""

    def losses(states: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), tokens, reduction="none")

    pieces = zip(states.split(HEAD_TOKENS), tokens.split(HEAD_TOKENS), strict=True)
    return torch.cat([checkpoint(losses, s, t, use_reentrant=False) for s, t in pieces])


class LanguageModelling(RowTask[Row]):
    """A `harness.tasks.base.Task` over rows of text, of which some turns are learned.

    Args:
        name, rows, signal_rows, max_tokens, notes: see `RowTask`.
        loss_on: learn the answers' tokens, or all but the first.
        chat, prompt_template, date, control_tokens: see `Writing`.
        packing: join rows to sequences of up to max_tokens, none of which sees another; a batch
            then holds so many sequences.
        generate_rows: how many rows of validation and test to answer by greedy generation, of
            those that were not cut the ones with the smallest sha256; 0 for none.
        max_new_tokens: the longest answer.
        stop: strings that end an answer, as the end of text does.
        held_out_text: file of the text on which forgetting is measured, None for the one of
            `harness.tasks.forgetting`; held_out_tokens: how much of it, 0 for none.
        eval_rows: how many rows of validation and test to keep, those with the smallest sha256;
            None for all.
    """

    labels: None = None
    answer_metrics: Mapping[str, Metric] = {  # what `summarise` gives
        "exact_match": Metric(higher_is_better=True, chance=0.0, per_item=True)
    }

    def __init__(
        self,
        name: str,
        rows: Mapping[str, Sequence[Row]],
        /,
        *,
        signal_rows: int = 256,
        max_tokens: int = 512,
        loss_on: Literal["completion", "all"] = "completion",
        chat: bool | None = None,
        prompt_template: str = "{prompt}",
        date: str = DATE,
        control_tokens: str = "text",
        packing: bool = False,
        generate_rows: int = 0,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        held_out_text: str | None = None,
        held_out_tokens: int = 512,
        eval_rows: int | None = None,
        notes: Sequence[str] = (),
    ):
        check_counts(or_zero=True, generate_rows=generate_rows, held_out_tokens=held_out_tokens)
        check_counts(max_new_tokens=max_new_tokens)
        check_type("eval_rows", eval_rows, int | None)
        if eval_rows is not None:
            check_positive("eval_rows", eval_rows)
        if loss_on not in ("completion", "all"):
            raise ValueError(f"loss_on is {loss_on!r}; it must be completion or all.")
        self.writing = Writing(
            chat=chat, prompt_template=prompt_template, date=date, control_tokens=control_tokens
        )
        check_type("packing", packing, bool)
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop is {stop!r}; it must be a list of texts, none of them empty.")
        self.held_out = forgetting.read_text(held_out_text) if held_out_tokens else ""
        kept = {}
        for split in ("validation", "test"):
            count = len(rows[split]) if eval_rows is None else eval_rows
            kept[split] = [rows[split][i] for i in smallest(rows[split], count)]
        super().__init__(
            name,
            {**rows, **kept},
            signal_rows=signal_rows,
            max_tokens=max_tokens,
            notes=notes,
            other_data=self.held_out if date == DATE else f"{self.held_out}\n{date}",
        )
        self.loss_on, self.packing = loss_on, packing
        self.stop, self.held_out_tokens = tuple(stop), held_out_tokens
        self.generate_rows, self.max_new_tokens = generate_rows, max_new_tokens
        self._given = dict(self.rows)
        self._chunked: bool | None = None  # until the model's head has been looked at

    @property
    def primary_metric(self) -> str:
        return "exact_match" if self.generate_rows else "loss_nats"

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics, whose chance levels are known once a tokenizer is."""
        vocabulary = None if self._tokenizer is None else len(self._tokenizer)
        answers = self.answer_metrics if self.generate_rows else {}
        return {**answers, **metrics.language_modelling(vocabulary)}

    # ---- what a concrete task may say ------------------------------------------------------------

    def score(self, answer: str, row: Row) -> dict[str, Any]:
        """Judges a generated answer, as {"correct": bool}, and what else is counted."""
        return {"correct": answer.strip() == row.answer.strip()}

    def summarise(self, scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Metrics of the answers, from what `score` gave for each."""
        return {"exact_match": sum(score["correct"] for score in scores) / len(scores)}

    # ---- tokens ----------------------------------------------------------------------------------

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> None:
        """Does what `RowTask` does. Raises ValueError also if a chat template is asked for and the
        tokenizer has none, or if `max_tokens` leaves nothing to learn of more than a tenth of a
        split."""
        self.rows = dict(self._given)  # of which an earlier call may have dropped some
        super().prepare(tokenizer, max_tokens)
        self._limit = max_tokens
        self._drop_lost(max_tokens)

    def check_base(self, base: "BaseModel") -> None:
        """Raises ValueError if an answer may be longer than the base reads, or if rows packed into
        a sequence would see each other there."""
        for split in ("validation", "test") if self.generate_rows else ():
            longest = max(len(self._prompt(split, i)) for i in self._to_answer(split))
            room = base.max_tokens - longest
            if self.max_new_tokens > room:
                raise ValueError(
                    f"the longest {split} prompt to answer has {longest} tokens and {base.name} "
                    f"reads {base.max_tokens}, which leaves fewer than task.max_new_tokens="
                    f"{self.max_new_tokens} for the answer: lower it to {room}, or task.max_tokens."
                )
        if self.packing and not _keeps_rows_apart(base.model):
            raise ValueError(
                f"{base.name} lets rows that are packed into one sequence see each other; set "
                "task.packing=false."
            )

    def _tokens_depend_on(self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int) -> str:
        self.writer = writer = Writer(tokenizer, self.writing)
        self._answers = any(row.turns[-1][0] != "text" for row in self.rows["train"])
        if self._answers:
            _ = writer.end  # if there is none, that is told before anything is tokenised
        found = (row for split in SPLITS for row in self.rows[split])
        tokens = (set().union(*writer.control_tokens(row)) for row in found)
        self.control_rows = [control for control in tokens if control]
        template = str(tokenizer.chat_template) if writer.chat else None
        settings = [self.loss_on, vars(self.writing), template, tokenizer.eos_token]
        return hashlib.sha256(json.dumps([self.fingerprint, settings]).encode()).hexdigest()

    def _tokenise(
        self, tokenizer: "PreTrainedTokenizerBase", max_tokens: int
    ) -> tuple[token_cache.Tokens, token_cache.Counts]:
        """Every split's tokens with their labels, how many rows of each were cut, and in how many
        a token is shared by a prompt and its answer."""
        everything = self.loss_on == "all"
        tokens: token_cache.Tokens = {}
        counts: token_cache.Counts = {"cut": {}, "shared": {}}
        for split in SPLITS:
            tokens[split] = {"input_ids": [], "labels": []}
            counts["cut"][split] = counts["shared"][split] = 0
            for row in self._encoded(split):
                labels = [
                    token if is_learned or (everything and place >= row.before) else IGNORED
                    for place, (token, is_learned) in enumerate(
                        zip(row.ids, row.learned, strict=True)
                    )
                ]
                counts["cut"][split] += len(row.ids) > max_tokens
                counts["shared"][split] += row.shared > 0
                tokens[split]["input_ids"].append(row.ids[:max_tokens])
                tokens[split]["labels"].append(labels[:max_tokens])
        return tokens, counts

    def _encoded(self, split: str) -> Iterator[Encoded]:
        """The rows of a split, some at a time: each is tokenised with its beginnings."""
        rows = self.rows[split]
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            some = rows[start : start + ROWS_AT_A_TIME]
            yield from encode(self.writer, [self.writer.write(row) for row in some])

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

    def _epoch(self, seed: int, batch_size: int, epoch: int) -> list[list[list[int]]]:
        """The batches of an epoch; each a list of sequences, each a list of row positions."""
        if not self.packing:
            batches = super()._epoch(seed, batch_size, epoch)
            return [[[i] for i in positions] for positions in batches]
        lengths = [len(ids) for ids in self._tokens["train"]["input_ids"]]
        shuffled = epoch_order([0] * len(lengths), batch_size=1, seed=seed, epoch=epoch)
        sequences = pack(map(int, shuffled), lengths, self._limit)
        whole = max(1, len(sequences) // batch_size)  # what is left over waits for another epoch
        return [sequences[n * batch_size : (n + 1) * batch_size] for n in range(whole)]

    def _batch(self, split: str, sequences: Sequence[Sequence[int]]) -> Batch:
        """Sequences of rows, padded on the right; see packing.py."""
        tokenizer, tokens = self._prepared(), self._tokens[split]
        lengths = [[len(tokens["input_ids"][i]) for i in rows] for rows in sequences]

        def joined(field: str, fill: int) -> Tensor:  # b t
            values = [[x for i in rows for x in tokens[field][i]] for rows in sequences]
            return padded(values, fill)

        assert tokenizer.pad_token_id is not None
        inputs = {"input_ids": joined("input_ids", tokenizer.pad_token_id)}
        labels = joined("labels", IGNORED)
        if any(len(rows) > 1 for rows in sequences):
            inputs["position_ids"] = position_ids(lengths)
            labels[inputs["position_ids"] == 0] = IGNORED  # nothing before it predicts it
        else:
            inputs["attention_mask"] = padded([[1] * length for (length,) in lengths], 0)
        ids = tuple(self.rows[split][i].id for rows in sequences for i in rows)
        return Batch(inputs, labels, rows=ids, n_tokens=sum(map(sum, lengths)))

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
        lengths = self._lengths(split)
        predictions: list[dict[str, Any]] = [{} for _ in lengths]
        total = count = 0.0

        def losses_of(positions: list[int]) -> list[tuple[float, float, int]]:
            batch = self._batch(split, [[i] for i in positions]).to(device)
            losses = self._losses(model, batch).double()
            learned = (batch.labels[:, 1:] != IGNORED).sum(1).tolist()
            rows = losses.split(learned)
            return [(float(row.sum()), float(row.mean()), len(row)) for row in rows]

        with evaluating(model):
            measured = by_length(losses_of, lengths, batch_size)
        for i, (loss, mean, learned) in measured.items():
            total, count = total + loss, count + learned
            predictions[i] = {"row": self.rows[split][i].id, "loss_nats": mean,
                              "learned_tokens": learned}  # fmt: skip
        mean = total / count
        found: dict[str, float | int] = {
            "loss_nats": mean,
            "perplexity": math.exp(min(mean, 700.0)),
            "n": len(lengths),
        }
        if not (split in ("validation", "test") and self.generate_rows):
            return Evaluation(found, predictions)
        answers, generation = self._answer(
            model, split, predictions, batch_size=batch_size, device=device
        )
        return Evaluation(found | answers, predictions, generation)

    def _answer(
        self, model: Any, split: str, predictions: list[dict[str, Any]], **batches: Any
    ) -> tuple[dict[str, float | int], dict[str, Any]]:
        """Generate, score, and write both into `predictions`; the metrics of the answers, and how
        they were generated."""
        rows, chosen, end = self.rows[split], self._to_answer(split), self.writer.end
        prompts = [self._prompt(split, i) for i in chosen]
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "end": end}
        with evaluating(model):
            answers = generate(
                model, self._prepared(), prompts, stop=self.stop, **settings, **batches
            )
        scores = []
        for i, answer in zip(chosen, answers, strict=True):
            scores.append(self.score(answer, rows[i]))
            predictions[i] |= {"label": rows[i].answer, "prediction": answer, **scores[-1]}
        config = pinned_config(model, self._prepared(), **settings)
        found = {**self.summarise(scores), "generated": len(chosen)}
        return found, recorded(config, [*self.stop, *end.texts])

    def _to_answer(self, split: str) -> list[int]:
        """Positions of the rows to be answered. Raises ValueError if there are none."""
        rows, lengths = self.rows[split], map(len, self._tokens[split]["input_ids"])
        whole = [i for i, length in enumerate(lengths) if length < self._limit]  # no answer is cut
        if not whole:
            raise ValueError(
                f"every {split} row was cut at max_tokens, so there is none to answer."
            )
        return [whole[i] for i in smallest([rows[i] for i in whole], self.generate_rows)]

    def _prompt(self, split: str, i: int) -> list[int]:
        return _asked(self.rows[split][i], self.writer)

    def remember(self, base: "BaseModel") -> "forgetting.Reference | None":
        """The base's predictions of the held-out text."""
        if not self.held_out_tokens:
            return None
        return forgetting.Reference(
            base.model, base.tokenizer, self.held_out, self.held_out_tokens, limit=base.max_tokens
        )

    # ---- for people ------------------------------------------------------------------------------

    def samples(self, split: str, predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Gives, of the answered rows, the prompt, the answer and the expected answer."""
        others = ("row", "loss_nats", "learned_tokens", "label", "prediction")
        return [
            {
                "row": made["row"],
                "prompt": self._prepared().decode(self._prompt(split, i)),
                "generated": made["prediction"],
                "expected": made["label"],
                **{name: value for name, value in made.items() if name not in others},
            }
            for i, made in enumerate(predictions)
            if "prediction" in made
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
        """Says what `RowTask` says, and how many rows were dropped."""
        found = super().describe()
        if lost := sum(self.lost_rows.values()):
            found += f"; {lost:,} rows were dropped, since their prompts fill max_tokens"
        if self._tokenizer is None:
            return found
        if shared := sum(self.shared_rows.values()):
            found += (
                f"; in {shared:,} rows a token holds the end of a prompt and the beginning of its "
                "answer, and is learned"
            )
        if self._answers:
            found += self.writer.end_sentence
        return found + control_sentence(self.control_rows)


@torch.no_grad()
def _head_is_plain(model: Any, batch: Batch) -> bool:
    """True if the logits are the output embedding of the last hidden state, and nothing more: some
    architectures scale or cap them."""
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    inputs = {name: tensor[:1] for name, tensor in batch.inputs.items()}
    with evaluating(model):
        ours = head(model.base_model(**inputs, use_cache=False).last_hidden_state).float()
        theirs = model(**inputs, use_cache=False).logits.float()
    return torch.equal(ours, theirs)


@torch.no_grad()
def _keeps_rows_apart(model: Any) -> bool:
    """True if a row's logits are the same after any other row in its sequence: recurrent models
    carry a state on, and some with attention do not look at where positions restart.

    The test: exchanging the row before it changes its logits by almost nothing, compared with the
    same exchange where positions do not restart. Not by exactly nothing: the experts of a MoE
    multiply other batches.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first, other, row = torch.randint(
        vocabulary, (3, 6), generator=torch.Generator().manual_seed(0)
    )
    ids = torch.stack([torch.cat([before, row]) for before in (first, other)] * 2)  # 4 12
    positions = position_ids([[6, 6], [6, 6], [12], [12]])
    inputs = {"input_ids": ids.to(model.device), "position_ids": positions.to(model.device)}
    with evaluating(model):
        try:
            apart, apart_too, seen, seen_too = model(**inputs, use_cache=False).logits[:, 6:]
        except TypeError:  # it takes no positions
            return False
    change, change_if_seen = (apart - apart_too).abs().max(), (seen - seen_too).abs().max()
    rounding = min(0.1, 1000 * torch.finfo(change.dtype).eps)
    return not bool(change > rounding * change_if_seen)  # true of nan, which the loss will tell
