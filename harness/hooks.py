"""Finds the parts of a method that never happened: hooks not called, adapters without a pass.

Either leaves another method than the one that was asked for, and no error: an adaptive rank that
never adapts is LoRA, and an adapter without a gradient is none.
"""

import weakref
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from harness import distributed
from harness.models.passes import waiting_experts
from harness.record import BrokenLaw
from variants.layer import AdapterLinear
from variants.method import RankAllocator, Variant
from variants.select import is_inside


class HookCounter:
    """Counts the calls of each layer's and the allocator's hooks, wherever they come from.

    Args:
        layers: by path; their hooks are wrapped in place.
        allocator: likewise, if the variant has one.
    """

    def __init__(self, layers: Mapping[str, AdapterLinear], allocator: RankAllocator | None):
        self.layers, self.allocator = layers, allocator
        self.calls = Counter[str]()
        for path, layer in layers.items():
            self._count(layer, "after_step", path)
            self._count(layer, "penalty", path)
        if allocator is not None:
            self._count(allocator, "after_step", "the allocator")
            self._count(allocator, "after_evaluation", "the allocator")

    def _count(self, owner: Any, hook: str, whose: str) -> None:
        real, weak = getattr(type(owner), hook), weakref.ref(owner)  # a model is freed with its run

        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls[f"{hook} of {whose}"] += 1
            return real(weak(), *arguments, **options)

        setattr(owner, hook, counted)

    def check(
        self, variant: Variant, *, taken: Collection[int], steps: int, evaluations: int
    ) -> None:
        """Raise BrokenLaw, at the end of a run, if a hook was not called as often as it must have
        been, or the allocator did not carry its schedule out.

        Args:
            taken: the steps that the optimiser took.
            steps: those that were tried, skipped ones too.
            evaluations: of the signal slice.
        """
        due = {f"after_step of {path}": len(taken) for path in self.layers}
        if variant.penalty_weight:
            due |= {f"penalty of {path}": steps for path in self.layers}
        if self.allocator is not None:
            due["after_step of the allocator"] = len(taken)
            due["after_evaluation of the allocator"] = evaluations
        for hook, count in due.items():
            if self.calls[hook] != count:
                raise BrokenLaw(
                    f"{hook} was called {self.calls[hook]} times in this run instead of {count}."
                )
        if self.allocator is not None and (unmet := self.allocator.unmet(self.layers, taken)):
            raise BrokenLaw(unmet)

    def state_dict(self) -> dict[str, int]:
        return dict(self.calls)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.calls = Counter(state)


class GradientWatch:
    """Sees which adapters are given a gradient, be it zero, as A's is while B is.

    Args:
        layers: of `model`, by path.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, AdapterLinear]):
        self.model = model
        trained = {
            path: [p for p in layer.roles().values() if p.requires_grad]
            for path, layer in layers.items()
        }
        self.watched = [path for path, parameters in trained.items() if parameters]
        self.seen: set[str] = set()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(lambda _, path=path: self.seen.add(path))
            for path in self.watched
            for parameter in trained[path]
        ]

    def check(self) -> None:
        """Stop watching. Raise BrokenLaw, naming it, for an adapter without a gradient, unless it
        belongs to an expert that no token has reached yet."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        seen = set().union(*distributed.gather(sorted(self.seen)))
        waiting = waiting_experts(self.model, seen)
        silent = [p for p in self.watched if p not in seen and not is_inside(p, waiting)]
        if silent:
            raise BrokenLaw(
                f"{silent[0]} got no gradient in {len(silent)} of {len(self.watched)} adapters: "
                "nothing that the loss depends on passes through it; leave it out of targets."
            )
