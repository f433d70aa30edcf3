"""Weights that stay in their file until they are used, so that a model is never held whole.

A variant that keeps its base in 4 bits needs each dense weight once, to code it. `load` gives a
model whose linear layers read their weight from the checkpoint's safetensors for the length of one
use; `variants.inject` reads each as it builds the layer in its place; `read_rest` reads what is
left. At most one weight is held in its dense form, and the model can be run meanwhile, slowly, as
the dense model it is.

transformers is handed placeholders of the right shape that hold one number each (a stride of 0), so
that names, prefixes, tied and missing tensors are its business here as everywhere.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file
from typing_extensions import TypedDict

from harness.disk.read import read_json
from harness.models.quantised import Packed, StoredLinear
from variants.select import is_inside
from variants.store import WeightStore

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class _Index(TypedDict):
    weight_map: dict[str, str]


class StreamedLinear(nn.Linear):
    """A linear layer whose weight is read anew at each use; `weight` is on the device `meta`.

    Args:
        file, key: where the weight (o, i) is.
        dtype: what it is read as.
    """

    def __init__(self, linear: nn.Linear, file: Path, key: str, dtype: torch.dtype):
        super().__init__(
            linear.in_features, linear.out_features, bias=False, device="meta", dtype=dtype
        )
        self.bias = linear.bias
        self._file, self._key = file, key
        self.train(linear.training)

    def read(self) -> Tensor:
        """The weight (o, i), from the file."""
        return _read(self._file, self._key).to(self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.read(), self.bias)


def files_of(source: Path | str, revision: str | None = None) -> dict[str, Path] | None:
    """Tensor's name -> safetensors file of a checkpoint, a folder or a Hub id; None if its weights
    are not in safetensors."""

    def file(name: str) -> Path | None:
        if isinstance(source, Path):
            return source / name if (source / name).is_file() else None
        found = cached_file(
            source, name, revision=revision, _raise_exceptions_for_missing_entries=False
        )
        return Path(found) if found else None

    if (single := file(SINGLE)) is not None:
        with safe_open(single, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), single)
    if (index := file(INDEX)) is None:
        return None
    shards = read_json(index, _Index)["weight_map"]
    if outside := sorted(name for name in shards.values() if Path(name).name != name):
        raise ValueError(f"{index} names {outside[0]}, which is not a file in its folder.")
    paths = {name: file(name) for name in set(shards.values())}
    if missing := sorted(name for name, path in paths.items() if path is None):
        raise ValueError(f"the checkpoint's index names {missing[0]}, which is not there.")
    return {key: path for key, name in shards.items() if (path := paths[name]) is not None}


def load(
    auto: Any,
    source: Path | str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    files: Mapping[str, Path],
    quantised: bool = False,
    revision: str | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]] | None:
    """The model with the linear layers of its backbone left in their files, and transformers'
    loading information; None if it makes of a tensor something else than a parameter.

    Args:
        quantised: bitsandbytes has written them; what it has quantised is read into stores.
    """
    packed = Packed(files, lambda key: _read(files[key], key)) if quantised else None
    given, where = {}, {}
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is not a dict)
                if packed is not None and key in packed.parts:
                    continue
                shape = tensors.get_slice(key).get_shape()
                if packed is not None and key in packed.keys:
                    shape = packed.shape(key)
                elif packed is not None:
                    shape = []  # read now: a mixture's experts are put together while it is loaded
                if len(shape) == 2:
                    placeholder = torch.zeros((), dtype=dtype)
                    given[key] = placeholder.expand(shape)
                    where[placeholder.data_ptr()] = (path, key)
                else:
                    given[key] = tensors.get_tensor(key).clone()
    held = list(given.values())  # or another tensor might get a placeholder's address
    with torch.device("meta"):
        architecture = type(auto.from_config(copy.deepcopy(config)))
    model, found = architecture.from_pretrained(
        None,
        config=config,
        state_dict=given,
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
    unread = {
        name: where.pop(p.data_ptr()) for name, p in parameters.items() if p.data_ptr() in where
    }
    unused = {key for _, key in where.values()} - set(found["unexpected_keys"])
    if unused - {key for key, *_ in found["mismatched_keys"]}:
        return None
    del held
    if model.can_generate():  # transformers reads them from a file of their own
        with contextlib.suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(
                source, revision=revision or "main"
            )
    for name, (file, key) in unread.items():
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        inside = is_inside(owner, [model.base_model_prefix])
        linear = type(module) is nn.Linear and kind == "weight"
        if packed is not None and key in packed.keys:
            if not linear:
                raise ValueError(
                    f"{key} is quantised, and no linear layer of {architecture.__name__}"
                )
            model.set_submodule(owner, StoredLinear(module, packed.store(key, dtype)))
        elif linear and inside and packed is None:
            model.set_submodule(owner, StreamedLinear(module, file, key, dtype))
        else:
            parameters[name].data = _read(file, key).to(dtype)
    return model, found


def outlined(model: PreTrainedModel, kind: Callable[[Tensor], WeightStore]) -> None:
    """Put stores into the backbone of a model of shapes, as a checkpoint of this kind has them."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and is_inside(path, [model.base_model_prefix]):
            model.set_submodule(path, StoredLinear(module, kind(module.weight.detach())))


def read_rest(model: nn.Module) -> None:
    """Replace every layer that is still on the disk by an ordinary one, and one of a quantised
    checkpoint that is not trained by one over its store."""
    paths = {module: path for path, module in model.named_modules()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, StoredLinear) and not child.weight.requires_grad:
                setattr(parent, name, child.left(paths[child]))
            elif isinstance(child, StreamedLinear | StoredLinear):
                setattr(parent, name, _dense(child))


class Tensors(Mapping[str, Tensor]):
    """A model's state, its streamed weights read one at a time as they are asked for."""

    def __init__(self, model: nn.Module, without: set[str]):
        self._state = {k: v for k, v in model.state_dict().items() if k not in without}
        self._streamed = {}
        for path, module in model.named_modules():
            if isinstance(module, StreamedLinear):
                self._streamed[f"{path}.weight"] = module
            elif isinstance(module, StoredLinear):
                del self._state[f"{path}.weight"]
                kept = module.store.state_dict(prefix=f"{path}.weight.")
                self._state |= {name: tensor for name, tensor in kept.items()}

    def __getitem__(self, name: str) -> Tensor:
        layer = self._streamed.get(name)
        return self._state[name] if layer is None else layer.read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _read(file: Path, key: str) -> Tensor:
    """A copy: the file is mapped for the length of this call alone."""
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(key).clone()


def _dense(layer: StreamedLinear | StoredLinear) -> nn.Linear:
    """The layer as it would have been loaded, trained if it is by now."""
    o, i = layer.weight.shape
    linear = nn.Linear(i, o, bias=False, device="meta", dtype=layer.weight.dtype)
    linear.weight = nn.Parameter(layer.read(), requires_grad=layer.weight.requires_grad)
    linear.bias = layer.bias
    return linear.train(layer.training)
