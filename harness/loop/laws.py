"""The laws that a result must not have broken, each of which no error would tell of.

The base is not written, what is frozen has no gradient, merging changes no function, all processes
hold the same adapter. And the method happened: an adaptive rank that never adapts is LoRA, and an
adapter without a gradient is none.
"""

import weakref
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.config.build import UnderTest
from harness.config.settings import TrainSettings
from harness.machine import distributed
from harness.models.fingerprint import tensors_sha256
from harness.models.passes import waiting_experts
from variants.layer import AdapterLinear
from variants.method import RankAllocator, Variant
from variants.select import is_inside
from variants.state import trained_state

# Largest difference of logits between the merged and the unmerged model that rounding explains.
MERGE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}


def base_fingerprint(model: nn.Module) -> str:
    """sha256 of every frozen parameter: the same before and after a run, or something wrote the
    base."""
    frozen = sorted((n, p) for n, p in model.named_parameters() if not p.requires_grad)
    return tensors_sha256((name, distributed.whole(p.detach())) for name, p in frozen)


class BrokenLaw(ValueError):
    """A result that cannot be trusted: the base was written, or merging changed the function, or
    what the method consists of was not done."""


def merged_max_abs_diff(
    model: nn.Module, layers: Mapping[str, AdapterLinear], inputs: Mapping[str, Tensor]
) -> float:
    """Compare the logits of one batch with the unmerged model's; each layer is merged while it is
    passed through, since a sharded one is whole then alone."""
    model.eval()
    with torch.no_grad():
        unmerged = model(**inputs).logits
        hooks = [
            hook
            for layer in layers.values()
            for hook in (
                layer.register_forward_pre_hook(lambda layer, _: layer.merge()),
                layer.register_forward_hook(lambda layer, *_: layer.unmerge()),
            )
        ]
        merged = model(**inputs).logits
        for hook in hooks:
            hook.remove()
    return float((merged - unmerged).abs().max())


def check_replicas(model: nn.Module, layers: Mapping[str, AdapterLinear]) -> None:
    """Raise BrokenLaw unless all processes hold the same trained values and ranks, to the bit."""
    if distributed.world_size() > 1:
        state = trained_state(model, layers)
        digests = distributed.gather(tensors_sha256(sorted(state.items())))
        if len(set(digests)) > 1:
            raise BrokenLaw("the processes of this run no longer hold the same adapter.")


def check_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise BrokenLaw if a weight that is not trained has a gradient, or asks for one. The loop
    clears those of the trained weights alone, so that a leak is seen at any later time."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) not in trained and (parameter.requires_grad or parameter.grad is not None):
            raise BrokenLaw(f"the frozen weight {name} has a gradient.")


def check_laws(model: nn.Module, before: str, merged_diff: float, dtypes: Sequence[str]) -> dict:
    """base_fingerprint and merged_max_abs_diff for the result. Raises BrokenLaw.

    Args:
        dtypes: that the model is kept in and computes in; the coarsest rounds the logits.
    """
    after = base_fingerprint(model)
    if before != after:
        raise BrokenLaw("something wrote the frozen base during the run.")
    if not merged_diff <= max(MERGE_TOLERANCE[dtype] for dtype in dtypes):
        raise BrokenLaw(f"the merged model's logits differ from the unmerged by {merged_diff:.3g}.")
    fingerprints: dict[str, Any] = {"before": before, "after": after}
    return {"base_fingerprint": fingerprints, "merged_max_abs_diff": merged_diff}


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


class Laws:
    """All of them for one run; it is made before the first step.

    Args:
        dtypes: that the model computes in and is kept in; the coarsest rounds the logits.
    """

    def __init__(self, test: UnderTest, dtypes: Sequence[str]):
        self.test, self.dtypes = test, dtypes
        self.fingerprint_before = base_fingerprint(test.model)
        self.hooks: HookCounter
        self.gradients: GradientWatch

    def watch(self) -> None:
        """Begin with the training."""
        self.hooks = HookCounter(self.test.layers, self.test.allocator)
        self.gradients = GradientWatch(self.test.model, self.test.layers)

    def after_step(self, steps_here: int, *, last: bool) -> None:
        """Look at the gradients where they may tell something: after the first steps of this
        process, and at the end. Raises BrokenLaw."""
        if steps_here == 1 or last:
            check_gradients(self.test.model, self.test.optimizer)
        if steps_here == 2 or last:
            self.gradients.check()

    def check_replicas(self) -> None:
        """See the function."""
        check_replicas(self.test.model, self.test.layers)

    def check(
        self,
        inputs: Mapping[str, Tensor],
        train: TrainSettings,
        *,
        skipped: Collection[int],
        signal: int,
    ) -> dict[str, Any]:
        """base_fingerprint and merged_max_abs_diff for the result, at the end of a run. Raises
        BrokenLaw.

        Args:
            inputs: of one batch, on the model's device.
            skipped: the steps that the optimiser did not take.
            signal: rows of the signal slice.
        """
        merged_diff = merged_max_abs_diff(self.test.model, self.test.layers, inputs)
        steps = train.steps
        taken = set(range(1, steps + 1)).difference(skipped)
        evaluations = (steps - 1) // train.eval_every if signal else 0
        self.hooks.check(self.test.variant, taken=taken, steps=steps, evaluations=evaluations)
        return check_laws(self.test.model, self.fingerprint_before, merged_diff, self.dtypes)
