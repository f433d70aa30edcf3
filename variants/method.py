"""A method under test: what it consists of, and the hooks of a training loop."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from variants.dropout import DropoutMasks
from variants.layer import AdapterLinear
from variants.settings import check_positive
from variants.store import DenseStore, WeightStore

Kind = TypeVar("Kind", bound=AdapterLinear)


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


def layers_of(
    kind: type[Kind], layers: Mapping[str, AdapterLinear], allocator: RankAllocator
) -> dict[str, Kind]:
    """The layers, typed. Raises ValueError on none, or on a layer of another variant."""
    found = {path: layer for path, layer in layers.items() if isinstance(layer, kind)}
    if not layers or len(found) < len(layers):
        kinds = sorted({type(layer).__name__ for layer in layers.values()}) or "no layer at all"
        raise ValueError(
            f"{type(allocator).__name__} allocates to {kind.__name__} only; found {kinds}."
        )
    return found


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
