"""Estimates the memory of a run from its config alone: no weight is read.

The model is built of shapes (`outline` of the model's loader), the variant is put into it, and its
forward and backward pass run without values under `trace.LiveBytes`. So the formula of a layer is
the layer itself, for every architecture, variant and store here. What it comes to, in a Llama-like
layer with n = b t tokens, hidden size h, MLP m wide, heads of size d of which a query and c key
and value, r the rank, f bytes a number of the model's dtype and g of the products' (train.
compute_dtype), all in the forward pass and kept for the backward:

    two RMS norms      2 n (h f + 4 h + 4): x W's input in float32 and its 1 / RMS; the output in f
    q, k, v, o         h = A x, r n g each; the inputs are counted above and below
    rotation           nothing: cos and sin are constants, kept once for all layers
    attention          n d (2 a + 2 c) f + 4 n a: q, k, v, output, log-sum-exp (`trace`)
    gate, up, down     4 n m f: gate, SiLU(gate), up and their product; h as above

A mask of padded rows costs 2 b t^2 bytes and up a layer; dropout's masks are windows of tables, one
for layers of about one size.
DoRA keeps each layer's output as well, n o g. tests/test_memory.py adds up the same sum by hand
and compares. With activation checkpointing a layer keeps its input alone, n h f, and one layer at
a time holds the rest. The output layer's logits exist for HEAD_TOKENS tokens at a time: three
arrays of HEAD_TOKENS x vocabulary, of which two are float32.

What it leaves out: the allocator's rounding and fragments, CUDA's context and the workspaces of
its kernels, evaluation (whose batches are larger and keep nothing).
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.config import build
from harness.disk.read import shortened
from harness.memory.trace import LiveBytes, fused_kernels
from harness.models.base import enable_activation_checkpointing
from harness.tasks.language import head_losses
from harness.words import size
from variants.dropout import DropoutMasks
from variants.layer import AdapterLinear

WORTH_ESTIMATING = 1_000_000  # parameters


@dataclass(frozen=True)
class BatchShape:
    """The shape of a batch, on which alone its cost depends.

    Args:
        rows, tokens: of the padded batch (rows, tokens).
        learned: tokens that a language model learns; None for all.
        padded: whether rows differ in length, so that there is a mask.
    """

    rows: int
    tokens: int
    learned: int | None = None
    padded: bool = True


@dataclass(frozen=True)
class Estimate:
    """Bytes at the moment of the peak of a training step.

    Args:
        weights_bytes: all that is frozen, buffers included.
        adapters_bytes: all that is trained, and the adapters' statistics.
        gradients_bytes: those that exist at the peak: none where it is the loss's.
        optimizer_bytes: the optimiser's state.
        activations_bytes: what autograd keeps at the peak, and what is being computed.
    """

    weights_bytes: int
    adapters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        parts = [
            f"{field.name.removesuffix('_bytes')} {size(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
        ]
        return f"{size(self.total_bytes)} ({', '.join(parts)})"


class Estimator:
    """Estimates for one config and any shape of batch.

    Args:
        config: resolved, plain values, as train.py has them.
        labels: of a classifier; None for a language model.

    Raises ValueError for a config that a run would refuse too.
    """

    def __init__(self, config: Mapping[str, Any], labels: Sequence[str] | None):
        self._accumulation = config["train"]["accumulation"]
        self._fused_dropout = config["train"]["device"].startswith("cuda")
        outline = build.outline_base(config, labels)
        self.max_tokens = outline.max_tokens
        self._mask_axes = 4
        self._model, self._classes = outline.model, labels and len(labels)
        parameters_total = sum(parameter.numel() for parameter in self._model.parameters())
        self._variant = build.make_variant(config)
        with LiveBytes(()):  # which answers for values that are not there
            self._layers = build.adapt(outline, self._variant, config)
            groups = self._variant.groups(self._model, lr=self._variant.lr)
        if config["train"]["activation_checkpointing"]:
            enable_activation_checkpointing(self._model)
        stacks = [m for m in self._model.modules() if isinstance(m, nn.ModuleList)]
        self._stack = max(stacks, key=len, default=nn.ModuleList())
        self._trained = [parameter for group in groups for parameter in group["params"]]
        adapters = [t for layer in self._layers.values() for t in _own(layer)]
        self._adapters_bytes = _nbytes([*adapters, *self._trained])
        held = _nbytes([*self._model.parameters(), *self._model.buffers(), *adapters])
        self.parameters_total = parameters_total
        self._weights_bytes = held - self._adapters_bytes
        self._optimizer_bytes = int(
            _state_bytes(config) * sum(parameter.numel() for parameter in self._trained)
        )

    def at(self, shape: BatchShape) -> Estimate:
        """Estimates a step whose largest microstep has this shape. Raises ValueError for a model
        whose code does not run without values."""
        try:
            try:
                return self._at(shape)
            except Exception:
                if not (shape.padded and self._mask_axes == 4):
                    raise
                self._mask_axes = 2  # it makes its own of the mask of tokens
                return self._at(shape)
        except Exception as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise ValueError(
                f"the memory of {self._model.config.model_type} cannot be estimated, since its "
                f"code does not run without values ({shortened(reason)})."
            ) from error

    def _at(self, shape: BatchShape) -> Estimate:
        """As `at`.

        Blocks that are all alike need not be walked through all. The backward pass lets go what one
        block kept and makes its gradients, so that the peak is at the top block or at the bottom
        one, and either grows by the same number of bytes with each block more.
        """
        blocks = self._stack
        if len(blocks) <= 3 or len({_kind(block) for block in blocks}) > 1:
            moments = self._walk(shape)
        else:
            two, three = (self._walk(shape, depth) for depth in (2, 3))
            more = len(blocks) - 3
            moments = [
                tuple(c + more * (c - b) for b, c in zip(before, after, strict=True))
                for before, after in zip(two, three, strict=True)
            ]
        peak, gradients = max(moments)
        return Estimate(
            weights_bytes=self._weights_bytes,
            adapters_bytes=self._adapters_bytes,
            gradients_bytes=gradients,
            optimizer_bytes=self._optimizer_bytes,
            activations_bytes=peak - gradients,
        )

    def _walk(self, shape: BatchShape, depth: int | None = None) -> list[tuple[int, ...]]:
        """Forward and backward through the first `depth` blocks, None for all: the peak and the
        gradients in it, first until the top block's gradients are made, then from there on."""
        model = self._model.train()
        blocks = list(self._stack)
        if depth is not None:
            del self._stack[depth:]
        tops = {id(p) for p in (self._stack[-1].parameters() if blocks else ()) if p.requires_grad}
        moments = [(0, 0)]
        made: set[int] = set()
        gradients = 0

        def risen() -> None:
            moments[-1] = (live.peak, gradients)

        def count(parameter: Tensor) -> None:
            nonlocal gradients
            gradients += parameter.numel() * parameter.element_size()
            made.add(id(parameter))
            if id(parameter) in tops and tops <= made and len(moments) == 1:
                live.peak = live.now
                moments.append((live.now, gradients))

        held = [t for layer in self._layers.values() for t in _own(layer)]
        live = LiveBytes([*model.parameters(), *model.buffers(), *held], risen)
        hooks = [p.register_post_accumulate_grad_hook(count) for p in self._trained]
        try:
            with fused_kernels(dropout=self._fused_dropout), live:
                for _ in range(min(self._accumulation, 2)):  # the second finds gradients there
                    gradients = _nbytes([p.grad for p in self._trained if p.grad is not None])
                    made.clear()
                    live.peak, moments[:] = 0, [(0, 0)]
                    self._loss(shape).backward()
                    if (penalty := self._variant.penalty(self._layers)) is not None:
                        penalty.backward()
                    del penalty
        finally:
            if depth is not None:
                self._stack.extend(blocks[depth:])
            for hook in hooks:
                hook.remove()
            for parameter in self._trained:
                parameter.grad = None
        walked: list[tuple[int, ...]] = [*moments, (0, 0)]
        return walked[:2]

    def _loss(self, shape: BatchShape) -> Tensor:
        """The loss of a task, of a batch without values."""
        masks = _MasksWithoutValues(step=0)
        for layer in self._layers.values():
            layer.masks = masks
        rows, tokens = shape.rows, shape.tokens
        meta: dict[str, Any] = {"device": "meta"}
        inputs = {"input_ids": torch.zeros(rows, tokens, dtype=torch.long, **meta)}
        if shape.padded:  # as transformers makes it of the rows' lengths
            axes = (rows, 1, tokens, tokens) if self._mask_axes == 4 else (rows, tokens)
            inputs["attention_mask"] = torch.ones(axes, dtype=torch.bool, **meta)
        model: Any = self._model
        if self._classes is not None:
            logits = model(**inputs).logits
            return F.cross_entropy(logits.float(), torch.zeros(rows, dtype=torch.long, **meta))
        count = rows * (tokens - 1) if shape.learned is None else shape.learned
        gold = torch.zeros(count, dtype=torch.long, **meta)
        if model.base_model is model:  # no part of it ends before the logits
            logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)[gold]
            return F.cross_entropy(logits.float(), gold)
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state  # b t h
        learned = hidden[:, :-1].flatten(0, 1)[gold]
        return head_losses(model.get_output_embeddings(), learned, gold).mean()


class _MasksWithoutValues(DropoutMasks):
    def _table(self, p, seed, count, device, dtype) -> Tensor:
        if (key := (p, count, dtype)) not in self._tables:
            draws = torch.empty(count, device=device, dtype=torch.int16)
            self._tables[key] = draws.float().to(dtype)
        return self._tables[key]


def _kind(block: nn.Module) -> tuple:
    """Gives equal values for blocks that cost the same, as far as shapes tell."""
    tensors = [*block.named_parameters(), *block.named_buffers()]
    return tuple((name, t.shape, t.dtype, t.requires_grad) for name, t in tensors)


def _own(layer: AdapterLinear) -> list[Tensor]:
    """The tensors of a layer without its store and a frozen bias."""
    held = [*layer.roles().values(), *layer.buffers(recurse=False)]
    return [tensor for tensor in held if tensor is not None]


def _nbytes(tensors: Sequence[Tensor]) -> int:
    """Sums the bytes of all tensors, each once."""
    each = {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(each.values())


def _state_bytes(config: Mapping[str, Any]) -> float:
    """The optimiser's state for one trained number, from a step on a few real ones."""
    factory = build.make_factory(config, "optimizer", "params")
    if (known := getattr(factory.func, "state_bytes_per_number", None)) is not None:
        return known
    numbers = nn.Parameter(torch.zeros(64))
    numbers.grad = torch.zeros(64)
    optimizer = factory([{"params": [numbers], "lr": 1e-3}])
    optimizer.step()
    state = [value for value in optimizer.state[numbers].values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in state if value.numel() > 1) / numbers.numel()


class Plan:
    """The memory that a run expects to take, for people.

    An architecture that cannot be walked through without values trains all the same, and it is said
    why there is no estimate; a small model fits everywhere and has none.
    """

    def __init__(self, config: Mapping[str, Any], task: Any):
        self._estimator: Estimator | None = None
        self.rows, self.tokens = config["train"]["batch_size"], task.max_tokens
        # Whatever goes wrong here, the run itself will say it, or not mind.
        with contextlib.suppress(Exception):
            estimator = Estimator(config, task.labels)
            self.tokens = min(task.max_tokens, estimator.max_tokens)
            if estimator.parameters_total >= WORTH_ESTIMATING:
                self._estimator = estimator

    def at(self, rows: int, tokens: int) -> Estimate | None:
        """Estimates a batch of this shape, padded unless it is one row."""
        if self._estimator is None:
            return None
        with contextlib.suppress(Exception):
            return self._estimator.at(BatchShape(rows, tokens, padded=rows > 1))
        return None

    def total_bytes(self, shape: tuple[int, int] | None) -> int | None:
        """The bytes expected at the peak, to compare with those measured there."""
        estimate = self.at(*shape) if shape is not None else None
        return None if estimate is None else estimate.total_bytes

    def describe(self) -> str:
        """A sentence before anything is loaded; empty of a small model."""
        if self._estimator is None:
            return ""
        try:
            estimate = self._estimator.at(BatchShape(self.rows, self.tokens, padded=self.rows > 1))
        except ValueError as error:
            return f"memory: {error}\n"
        return f"memory: at most about {estimate} for {self.rows} rows of {self.tokens} tokens\n"
