"""The parts of every variant: a layer that adapts a frozen weight, a record naming a method.

Every low-rank variant in this package is

    W' = diag(g) (W + s B A)        y = x W'^T + bias

with W (o, i) frozen, B (o, k), A (k, i), s a number and g (o,) a row gain that is 1 for most.
A variant states its factors and its gain; the base class owns W' itself (`definition`),
one fast path (`adapted`), merging, export and state for all of them.

Shapes: i input features, o output features, r rank allocated, k rank active (k <= r),
... batch axes, n rows of a flattened batch.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.checks import check_positive, check_type
from variants.dropout import DropoutMasks, Mask
from variants.fused import gained_low_rank_linear
from variants.reading import ReadWeight
from variants.store import DenseStore, WeightStore


class AdapterLinear(nn.Module, ABC):
    """A linear map (o, i) over a frozen store, adapted by what its subclass trains.

    Code that reaches past `forward` for the weight sees W', not W: `variants.reading`.

    Args:
        store: the frozen weight.
        bias: (o,) or None. Never scaled by the gain.
        path: the module's path in the unwrapped model; names the layer in messages and seeds it.
        seed: with `path` and a role, all that an initial value depends on.
        compute_dtype: the dtype of the matrix products; None keeps the input's. What is trained
            stays float32, and the output has the input's dtype.
        scale: s.
        dropout: probability of dropping an entry of the low-rank product's input.
    """

    def __init__(
        self,
        store: WeightStore,
        bias: Tensor | None,
        *,
        path: str,
        seed: int,
        compute_dtype: torch.dtype | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_type("dropout", dropout, float)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; it must lie in [0, 1).")
        self.store = store
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.out_features, self.in_features = store.shape
        self.path, self.seed, self.compute_dtype = path, seed, compute_dtype
        self.scale, self.dropout = float(scale), float(dropout)
        self.masks: DropoutMasks | None = None  # of this pass over a batch: begin_step
        self.part = (0, 1)  # of each batch: this process's part, and how many there are
        self.register_buffer("merged_weight", None, persistent=False)
        self.merged_weight: Tensor | None

    # ---- what a variant writes ------------------------------------------------------------------

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """B (o, k) and A (k, i), differentiable."""

    def gain(self) -> Tensor | None:
        """g (o,), or None for ones."""
        return None

    def roles(self) -> Mapping[str, nn.Parameter]:
        """Every trainable parameter once, under the paper's symbol."""
        trained = self.bias is not None and self.bias.requires_grad
        return {"bias": self.bias} if trained else {}  # type: ignore[dict-item]

    def penalty(self) -> Tensor | None:
        """An unweighted term of the loss, or None."""
        return None

    def after_step(self, step: int) -> None:
        """Called after optimizer.step() and before zero_grad(), for the layer's own statistics."""

    @classmethod
    def narrowed(cls, options: Mapping[str, Any], least: int) -> dict[str, Any]:
        """The changes to this class's `options` that fit the rank to a layer whose smaller side
        is `least`, with the same s; nothing where it fits, or there is no rank."""
        return {}

    def active_rank(self) -> int:
        """k, the rank in use now."""
        return self.factors()[1].shape[0]

    def active_parameters(self) -> int:
        """The number of trained numbers in use now; fewer than are held once ranks are pruned."""
        return sum(parameter.numel() for parameter in self.roles().values())

    # ---- what every variant gets ----------------------------------------------------------------

    def definition(self) -> Tensor:
        """W' (o, i) in float32, from the formula, differentiable in what is trained."""
        B, A = self.factors()
        weight = torch.addmm(self.store.dequantize(torch.float32), B, A, alpha=self.scale)
        gain = self.gain()
        return weight if gain is None else gain[:, None] * weight

    @torch.no_grad()
    def adapted_weight(self) -> Tensor:
        """W' (o, i) in float32, a tensor of its own."""
        return self.definition()

    @property
    def weight(self) -> Tensor:
        """W' (o, i) in the base's dtype, for a model's code that reads it."""
        if torch.compiler.is_compiling():
            return self.definition().to(self.store.dtype)
        return ReadWeight(self)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """W' - W (o, i) in float32: the change that the variant is."""
        return self.adapted_weight() - self.store.dequantize(torch.float32)

    def adapted(self, x: Tensor) -> Tensor:
        """x (..., i) -> x W'^T + bias (..., o): the definition, computed fast."""
        B, A = self.factors()
        return gained_low_rank_linear(
            x,
            self.store,
            self.bias,
            B,
            A,
            scale=self.scale,
            gain=self.gain(),
            dropout=self.dropout if self.training else 0.0,
            mask=self.mask(),
            compute_dtype=self.compute_dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (..., i) -> (..., o) in x's dtype; one matrix product if merged."""
        if self.merged_weight is None:
            return self.adapted(x)
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.merged_weight.to(dtype), bias).to(x.dtype)

    def mask(self) -> Mask | None:
        """The dropout mask of this forward pass, which is drawn again in the backward pass; None if
        nothing is dropped."""
        if not (self.training and self.dropout > 0.0):
            return None
        if self.masks is None:
            raise RuntimeError(
                f"{self.path} has dropout but was not told the step: call "
                "variants.begin_step(layers, step) before each forward pass in training."
            )
        return functools.partial(self.masks.keep, self.dropout, self.seed, self.path, self.part)

    def merge(self) -> None:
        """Cache W' beside the store, which is never written."""
        self.merged_weight = self.adapted_weight()

    def unmerge(self) -> None:
        """Forget the cached W'. Exact, since nothing was added to the store."""
        self.merged_weight = None

    @torch.no_grad()
    def export(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary linear layer holding W' and the bias in `dtype`."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(self.adapted_weight().to(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return linear

    def adapter_state(self) -> dict[str, Tensor]:
        """Everything but the base: what is trained and the layer's statistics."""
        frozen_bias = self.bias is not None and not self.bias.requires_grad
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith("store.") and not (name == "bias" and frozen_bias)
        }

    def used_factors(self) -> tuple[Tensor, Tensor]:
        """`factors` without the directions that are masked, for those who only read them."""
        return self.factors()

    def take(self, factors: Mapping[str, Tensor], scale: float) -> None:
        """Start from a low-rank adapter that was trained elsewhere.

        Args:
            factors: B (o, k) and A (k, i); perhaps E (k,), for B diag(E) A; perhaps m (o,), the
                row norms of W'. Directions that the layer has beyond k keep their initial A, with
                nothing on B's side.
            scale: s there; a layer with another one takes it into its factors.

        Raises ValueError if they do not fit the layer, or the variant has no such factors.
        """
        raise ValueError(f"{self.path}: this variant has no factors that could be taken over.")

    def _fitted(
        self, factors: Mapping[str, Tensor], rank: int, symbols: str = "ABE"
    ) -> dict[str, Tensor]:
        """The factors to `take` in float32, E as ones if there is none."""
        if extra := set(factors) - set(symbols):
            raise ValueError(f"{self.path}: this variant has no {min(extra)}, and the adapter has.")
        B, A = factors["B"].float(), factors["A"].float()
        k = A.shape[0]
        E = factors["E"].float() if "E" in factors else torch.ones(k)
        shapes = (*B.shape, *A.shape, *E.shape)
        if shapes != (self.out_features, k, k, self.in_features, k):
            raise ValueError(
                f"{self.path} is {self.out_features} x {self.in_features}; the adapter's B is "
                f"{tuple(B.shape)}, its A {tuple(A.shape)}."
            )
        if k > rank:
            raise ValueError(f"{self.path} has room for rank {rank}; the adapter's is {k}.")
        return {"A": A, "B": B, "E": E}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `adapter_state` gave. Raises ValueError on a missing or extra name."""
        if set(state) != set(self.adapter_state()):
            raise ValueError(
                f"{self.path} expects {sorted(self.adapter_state())}, found {sorted(state)}."
            )
        self.load_state_dict(dict(state), strict=False)
        self.unmerge()

    def extra_repr(self) -> str:
        return f"{self.path}: {self.in_features} -> {self.out_features}, scale={self.scale:g}"


class RankAllocator(Protocol):
    """Decides ranks for a whole model. Both hooks return what to log (`rank/...`)."""

    def after_step(
        self, layers: Mapping[str, AdapterLinear], optimizer: torch.optim.Optimizer, step: int
    ) -> dict[str, float]:
        """After optimizer.step() and the layers' own after_step, before zero_grad()."""

    def after_evaluation(
        self,
        layers: Mapping[str, AdapterLinear],
        optimizer: torch.optim.Optimizer,
        step: int,
        loss_nats: float,
    ) -> dict[str, float]:
        """After each scheduled evaluation, with the loss on the withheld slice of train."""

    def unmet(self, layers: Mapping[str, AdapterLinear], steps: Collection[int]) -> str:
        """At the end of a run that took these steps: what of the schedule was not carried out, in
        one sentence; nothing if all was."""

    def state_dict(self) -> dict:
        """All that a resumed run needs, as JSON values."""

    def load_state_dict(self, state: dict) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One method under test: the parts of a run that are allowed to differ.

    Args:
        name: as in conf/variant/.
        lr: the learning rate, tuned per method.
        store: dense weight (o, i) -> WeightStore.
        adapter: (store, bias, path=, seed=, compute_dtype=) -> AdapterLinear.
        groups: (model, lr=) -> optimiser groups.
        allocator: (layers, total_steps=, seed=) -> RankAllocator.
        penalty_weight: what the layers' penalties, reduced by penalty_reduction, are multiplied by.
        bias: which biases are trained: none, those of adapted layers, or all of the model's.
    """

    name: str
    lr: float
    adapter: Callable[..., AdapterLinear]
    groups: Callable[..., list[dict]]
    store: Callable[[Tensor], WeightStore] = DenseStore
    allocator: Callable[..., RankAllocator] | None = None
    penalty_weight: float = 0.0
    penalty_reduction: Literal["mean", "sum"] = "mean"
    bias: Literal["none", "adapted", "all"] = "none"

    def penalty(self, layers: Mapping[str, AdapterLinear]) -> Tensor | None:
        """The weighted penalty over all layers, or None if this variant has none."""
        if self.penalty_weight == 0.0:
            return None
        terms = [term for layer in layers.values() if (term := layer.penalty()) is not None]
        if not terms:
            return None
        reduced = torch.mean if self.penalty_reduction == "mean" else torch.sum
        return self.penalty_weight * reduced(torch.stack(terms))


def check_penalty(variant: Variant, layers: Mapping[str, AdapterLinear]) -> None:
    """Raise ValueError for a penalty weight that no layer has a penalty for, or a wrong setting."""
    check_positive("penalty_weight", variant.penalty_weight, or_zero=True)
    if variant.penalty_reduction not in ("mean", "sum"):
        raise ValueError(
            f"penalty_reduction is {variant.penalty_reduction!r}; it must be mean or sum."
        )
    if variant.penalty_weight and variant.penalty(layers) is None:
        raise ValueError(
            f"penalty_weight is {variant.penalty_weight}, but the layers of variant "
            f"{variant.name!r} have no penalty; leave it out."
        )


def begin_step(layers: Mapping[str, AdapterLinear], step: int, microstep: int = 0) -> None:
    """Tell the layers which pass over a batch comes next: dropout masks are a function of it.

    Microsteps of one step count up, with no optimiser's step between them.
    """
    masks = DropoutMasks(step, microstep)
    for layer in layers.values():
        layer.masks = masks


def after_step(
    layers: Mapping[str, AdapterLinear],
    optimizer: torch.optim.Optimizer,
    step: int,
    allocator: RankAllocator | None = None,
) -> dict[str, float]:
    """Run the hooks of one finished optimiser step; call it before zero_grad()."""
    for layer in layers.values():
        layer.after_step(step)
    return {} if allocator is None else allocator.after_step(layers, optimizer, step)
