"""Tokens that a base model did not have: their rows of embedding and output layer are trained.

`model.new_tokens=[<a>,<b>]` gives the tokenizer words of its own, which texts are cut at. Their
rows start at the mean of all others, plus a hundredth of their spread, so that no two are alike
(Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"). Everything else of
the two matrices stays frozen, tied or not: the rows are a parameter `token_rows` (n, h) of their
own, put in place of what the frozen matrix gives for these tokens. PEFT calls them trainable
tokens.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.models.base import BaseModel, Outline, tokenizer_sha256
from variants.layer import AdapterLinear
from variants.streams import draw_rows

ROWS = "token_rows"


def add(base: BaseModel, tokens: Sequence[str], seed: int) -> BaseModel:
    """`base` with further tokens, whose rows are drawn from `seed`.

    Raises ValueError for a token that is none, or that the tokenizer has already.
    """
    known = base.tokenizer.get_vocab()
    for token in check(tokens):
        if token in known:
            raise ValueError(
                f"model.new_tokens has {token!r}, which the tokenizer of {base.name} knows already;"
                " leave it out."
            )
    before, old = len(known), base.model.get_input_embeddings().get_parameter("weight").shape[0]
    base.tokenizer.add_tokens([*tokens])
    vocabulary = base.tokenizer.get_vocab()
    ids = tuple(vocabulary[token] for token in tokens)
    resize(base.model, max(old, max(ids) + 1))
    with torch.no_grad():
        for path, module in _embeddings(base.model).items():
            weight = module.get_parameter("weight")
            rows = weight[: min(before, old)].float()
            noise = draw_rows(
                len(ids), rows.shape[1], seed, path, ROWS, distribution="normal", std=1.0
            )
            start = rows.mean(0) + 0.01 * rows.std(0) * noise.to(weight.device)
            weight[list(ids)] = start.to(weight.dtype)
    return dataclasses.replace(
        base, tokenizer_sha256=tokenizer_sha256(base.tokenizer), new_tokens=ids
    )


def outline(base: Outline, tokens: Sequence[str]) -> Outline:
    """The same of shapes. Without a tokenizer none of its embedding's rows counts as free."""
    rows = base.model.get_input_embeddings().get_parameter("weight").shape[0]
    count = len(check(tokens))
    resize(base.model, rows + count)
    return dataclasses.replace(base, new_tokens=tuple(range(rows, rows + count)))


def check(tokens: Any) -> Sequence[str]:
    """Raises ValueError unless they are words, each once."""
    if not isinstance(tokens, Sequence) or isinstance(tokens, str):
        raise ValueError(f"model.new_tokens is {tokens!r}; it must be a list of words.")
    for token in tokens:
        if not isinstance(token, str) or not token.strip():
            raise ValueError(f"model.new_tokens has {token!r}; each must be a word.")
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"model.new_tokens is {[*tokens]}; each must be given once.")
    return tokens


def resize(model: PreTrainedModel, rows: int) -> None:
    """Give the embedding and the output layer so many rows; no values for new ones."""
    if model.get_input_embeddings().get_parameter("weight").shape[0] != rows:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _embeddings(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The embedding, and the output layer where it has a matrix of its own, by path."""
    found: list[nn.Module] = [model.get_input_embeddings()]
    output = model.get_output_embeddings()
    weight = found[0].get_parameter("weight")
    if output is not None and output._parameters.get("weight", weight) is not weight:
        found.append(output)
    return {path: module for path, module in model.named_modules() if module in found}


def names(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, Sequence[int]]:
    """The tokens to train for each of the embedding and the untied output layer, by path."""
    return dict.fromkeys(_embeddings(model), ids)


@torch.no_grad()
def attach(model: nn.Module, trained: Mapping[str, Sequence[int]]) -> None:
    """Train the rows of these tokens, by the path of their module, from the values that it has.

    Call it when the adapters are in place. Raises ValueError where the whole matrix is adapted or
    trained.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for path, ids in trained.items():
        module = model.get_submodule(path)
        weight = module._parameters.get("weight")
        if weight is None or weight.requires_grad or isinstance(output, AdapterLinear):
            raise ValueError(
                f"the rows of new tokens in {path} cannot be trained beside the whole matrix; "
                "leave model.new_tokens out, or the embedding and the output layer out of targets "
                "and train_modules."
            )
        order = sorted(ids)
        module.register_parameter(ROWS, nn.Parameter(weight[order].float()))
        index = torch.tensor(order, device=weight.device)
        module.register_buffer("token_ids", index, persistent=False)
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(_look_up)
        else:
            module.register_forward_hook(functools.partial(_multiply, rows_of=module))
        if output is None or output is module or output._parameters.get("weight") is not weight:
            continue
        if any(model.get_submodule(other) is output for other in trained):
            raise ValueError(f"{path} is tied, and its output layer trains rows of its own.")
        output.register_forward_hook(functools.partial(_multiply, rows_of=module))


def _look_up(module: Any, args: tuple, out: Tensor) -> Tensor:
    ids = args[0]
    place = torch.searchsorted(module.token_ids, ids).clamp_max(len(module.token_ids) - 1)
    own = F.embedding(place, module.token_rows) * getattr(module, "embed_scale", 1.0)
    return torch.where((module.token_ids[place] == ids)[..., None], own.to(out.dtype), out)


def _multiply(module: nn.Module, args: tuple, out: Tensor, *, rows_of: Any) -> Tensor:
    """The logits of these tokens anew, with the layer's own bias."""
    y = F.linear(args[0], rows_of.token_rows.to(args[0].dtype))
    if (bias := getattr(module, "bias", None)) is not None:
        y = y + bias[rows_of.token_ids].to(y.dtype)
    return out.index_copy(-1, rows_of.token_ids, y.to(out.dtype))


def rows(model: nn.Module) -> dict[str, tuple[list[int], Tensor]]:
    """The trained tokens and their rows (n, h), by the path of their module."""
    return {
        path: (module.token_ids.tolist(), module.token_rows)
        for path, module in model.named_modules()
        if ROWS in module._parameters
    }


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Write the trained rows into the matrices that they stand for, and forget them."""
    for path in rows(model):
        module: Any = model.get_submodule(path)
        module.weight[module.token_ids] = module.token_rows.to(module.weight.dtype)
        del module.token_rows, module.token_ids
    for part in model.modules():
        for key, hook in list(part._forward_hooks.items()):
            if hook is _look_up or getattr(hook, "func", None) is _multiply:
                del part._forward_hooks[key]
