"""Finds the weights of a model that a text passes through.

A checkpoint may hold more than a task uses: the vision tower of a multimodal model that is trained
on text, a head for another task. An adapter there would never learn, and be counted and exported
all the same. So a short text is passed through the model before anything is adapted, and the graph
that autograd leaves says which weights took part. Linear layers are replaced by a sum for that
pass: nothing is multiplied, nothing read from a disk, and no value matters.
"""

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from harness.words import kind_of
from variants.layer import AdapterLinear
from variants.select import PARTS, in_part, is_inside, layer_index
from variants.site import Expert, computes_linear, holds_matrix, matrix

# The least share of the matrix weights that a word of targets claims, under adapters.
ENOUGH = {"all-linear": 0.9, **dict.fromkeys(PARTS, 0.1)}


@dataclass(frozen=True)
class Passed:
    """The parameters that take part in the pass over a text.

    Args:
        parameters: names of those with two axes or more, a tied one's all.
        matrices: name -> how many numbers, of the weights with two axes or more, without the
            embeddings, the output layer and a classifier's head.
        read: paths of the linear layers whose weight the model's code multiplies with itself,
            instead of calling the layer.
    """

    parameters: frozenset[str]
    matrices: Mapping[str, int]
    read: frozenset[str] = frozenset()


def through(model: PreTrainedModel, head: Sequence[str] = ()) -> Passed:
    """The parts of `model` that a text passes through; it is unchanged. A model that wants more
    than a text counts as a whole.

    Raises ValueError if the model's code writes a weight.
    """
    reached, read = _reached(model) or (
        {name for name, _ in model.named_parameters(remove_duplicate=False)},
        set(),
    )
    waiting = waiting_experts(model, {name.rpartition(".")[0] for name in reached})
    outside = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if (output := model.get_output_embeddings()) is not None:
        outside.append(output)
    outer = {id(parameter) for module in outside for parameter in module.parameters()}

    def takes_part(name: str) -> bool:
        return name in reached or is_inside(name, waiting)

    return Passed(
        parameters=frozenset(
            name
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if parameter.ndim > 1 and takes_part(name)
        ),
        matrices={
            name: parameter.numel()
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and id(parameter) not in outer and takes_part(name)
            and not is_inside(name, head)
        },
        read=frozenset(name.removesuffix(".weight") for name in read),
    )  # fmt: skip


def waiting_experts(model: nn.Module, used: Collection[str]) -> list[str]:
    """Paths of unused modules that other tokens may use: those of a list within a block of which
    another one is used.

    Args:
        used: paths of modules.
    """
    parts = (path.split(".") for path in used)
    alive = {".".join(part[:n]) for part in parts for n in range(len(part) + 1)}
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if path in alive and layer_index(path) is not None
        for name, child in module.named_children()
        if isinstance(module, nn.ModuleList | nn.ModuleDict) or isinstance(child, Expert)
        if f"{path}.{name}" not in alive
    ]  # fmt: skip


def coverage(
    passed: Passed,
    model: nn.Module,
    layers: Mapping[str, AdapterLinear],
    *,
    chosen: str | Sequence,
    word: str = "all-linear",
) -> dict[str, Any]:
    """Counts the matrix weights, those that are under an adapter or trained themselves, and the
    others by kind, the largest first.

    Args:
        chosen: the depths that `layers` of the config asks for; no others are looked at.
        word: of targets; only the weights that it claims are looked at.
    """
    depths = {layer_index(path) for path in layers}
    under: Counter[str] = Counter()
    for layer in layers.values():
        assert layer.site is not None
        under[layer.site.parameter] += layer.out_features * layer.in_features
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    total = adapted = 0
    left_out: Counter[str] = Counter()
    for name, count in passed.matrices.items():
        if (chosen != "all" and layer_index(name) not in depths) or not _claims(word, name):
            continue
        total += count
        adapted += (here := count if name in trained else under[name])
        if here < count:
            left_out[kind_of(name)] += count - here
    return {"total": total, "adapted": adapted, "left_out": dict(left_out.most_common())}


def _claims(word: str, name: str) -> bool:
    """True if a weight is of what a word of targets sounds like."""
    return word == "all-linear" or (word in PARTS and in_part(name, word))


def check_coverage(found: Mapping[str, Any], word: str, meant: bool) -> None:
    """Raise ValueError if a word of targets adapts less of what it claims than `ENOUGH`, and nobody
    has said that it may.

    Args:
        found: by `coverage` of that word; of a name, nothing is asked.
    """
    if meant or found["adapted"] >= ENOUGH.get(word, 0.0) * found["total"]:
        return
    share = {kind: count / found["total"] for kind, count in found["left_out"].items()}
    named = ", ".join(f"{kind} ({part:.0%})" for kind, part in list(share.items())[:4])
    claimed = "this model's" if word == "all-linear" else f"the {word}'s"
    raise ValueError(
        f"targets is {word}, which adapts {found['adapted'] / found['total']:.0%} of {claimed} "
        f"matrix weights: {named} would stay as they are; partial=true says that this is meant."
    )


def _reached(model: PreTrainedModel) -> tuple[set[str], set[str]] | None:
    """Names of the parameters that the logits of a short text depend on, and of those among them
    that are a linear layer's and not used by a call of it; None if the model cannot be given a
    text."""
    named = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, set[str]] = {}
    for name, parameter in named.items():
        names.setdefault(id(parameter), set()).add(name)
    before = {name: (p.requires_grad, p._version) for name, p in named.items()}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        warnings.simplefilter("ignore")
        with _without_products(model, names) as own:
            for parameter in named.values():
                parameter.requires_grad_(parameter.is_floating_point())
            try:
                with _NumbersUnknown():
                    logits = model(input_ids=_text(model)).logits
            except Exception:  # it wants an image, or lengths that no one knows
                return None
            finally:
                for name, parameter in named.items():
                    parameter.requires_grad_(before[name][0])
    for name, parameter in named.items():
        if parameter._version != before[name][1]:
            raise ValueError(f"the code of {type(model).__name__} writes {name} in a forward pass.")
    reached, read = set(), set()
    for leaf in _leaves(logits):
        found = names.get(id(leaf), set())
        reached |= found
        if id(leaf) in own and len(found) == 1:  # not where it is an embedding's as well
            read |= found
    return reached, read


def _text(model: PreTrainedModel) -> Tensor:
    """A few token ids that mean nothing, and the end of a text, (1, t)."""
    config = model.config.get_text_config()
    special: set[int] = set()
    for key, value in [*config.to_dict().items(), *model.config.to_dict().items()]:
        if key.endswith(("_token_id", "_token_index")):
            special.update(value if isinstance(value, list) else [value])
    plain = [i for i in range(config.vocab_size) if i not in special][:4]
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    device = model.get_input_embeddings().get_parameter("weight").device
    return torch.tensor([[*plain, *([] if end is None else [end])]], device=device)


@contextmanager
def _without_products(model: nn.Module, names: dict[int, set[str]]) -> Iterator[set[int]]:
    """Let each linear layer give the first entry of its input and a number that stands for its
    weight; `names` learns which. The ids of those weights."""
    stood: list[nn.Module] = []

    def stand_in(outputs: int, mark: Tensor, input: Tensor) -> Tensor:
        y = input[..., :1] + mark.to(input.dtype)
        return y.expand(*input.shape[:-1], outputs).clone()

    for module in model.modules():
        if holds_matrix(module) and computes_linear(module):
            mark = torch.zeros((), requires_grad=True)
            names[id(mark)] = names[id(module.get_parameter("weight"))]
            module.__dict__["_mark"] = mark  # or its id might be another's
            module.__dict__["forward"] = partial(stand_in, len(matrix(module)), mark)
            stood.append(module)
    try:
        yield {id(module.get_parameter("weight")) for module in stood}
    finally:
        for module in stood:
            del module.__dict__["forward"], module.__dict__["_mark"]


class _NumbersUnknown(TorchDispatchMode):
    """Refuses to give a number of a tensor on the device `meta`, which a mode around this one may
    make up (harness.memory.trace): the layers that a model calls may depend on it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        scalar = func is torch.ops.aten._local_scalar_dense.default
        if scalar and args[0].is_meta and args[0].dtype != torch.bool:
            raise ValueError("a model without values was asked for a number")
        return func(*args, **(kwargs or {}))


def _leaves(value: Tensor) -> Iterator[Tensor]:
    """The leaves that a tensor depends on."""
    seen, waiting = set(), [value.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            yield variable
        waiting.extend(following for following, _ in node.next_functions)
