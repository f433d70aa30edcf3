"""Checkpoints that bitsandbytes wrote: their codes and scales, in our stores as they are.

A matrix `x.weight` in 4 bits is its packed codes and, with bitsandbytes' names,

    x.weight.absmax, x.weight.quant_map            the scales of blocks, the table of 16 values
    x.weight.nested_absmax, .nested_quant_map      where the scales are in 8 bits themselves
    x.weight.quant_state.bitsandbytes__nf4         JSON in bytes: shape, block sizes, offset

and one in 8 bits has int8 codes and `x.SCB`, the absmax of each row. Nothing is quantised again,
and no matrix is dense on the way.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, NotRequired

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedConfig
from typing_extensions import TypedDict

from harness.disk.read import check
from variants.int8 import Int8Store
from variants.layer import UnadaptedLinear
from variants.product import frozen_linear
from variants.qlora import Nf4Store
from variants.store import WeightStore

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_Size = Annotated[int, Field(ge=1)]


class _QuantState(TypedDict):
    quant_type: Literal["nf4"]
    blocksize: _Size
    dtype: str
    shape: Annotated[list[_Size], Field(min_length=2, max_length=2)]
    nested_blocksize: NotRequired[_Size]
    nested_dtype: NotRequired[Literal["float32"]]
    nested_offset: NotRequired[float]


def store_of(config: PreTrainedConfig, name: str) -> Callable[[Tensor], WeightStore] | None:
    """Takes the quantisation out of a model's configuration and gives the kind of its stores; None
    if it has none.

    Raises ValueError, with what to load instead, for a quantisation that is not read here.
    """
    told = getattr(config, "quantization_config", None)
    if told is None:
        return None
    told = told if isinstance(told, Mapping) else told.to_dict()
    method = str(told.get("quant_method", "bitsandbytes"))
    eight, four = (told.get(f"load_in_{bits}bit") for bits in (8, 4))
    if method == "bitsandbytes" and eight:
        kind: Callable[..., WeightStore] = Int8Store
    elif method == "bitsandbytes" and four and told.get("bnb_4bit_quant_type") == "nf4":
        double = told.get("bnb_4bit_use_double_quant") is True
        kind = functools.partial(Nf4Store, double_quantization=double)
    else:
        method = "FP4" if method == "bitsandbytes" else method.upper()
        raise ValueError(
            f"{name} is quantised already, in {method}, which is not read here; give the "
            "unquantised model, which variant=qlora keeps in 4 bits, or one that bitsandbytes has "
            "written in NF4 or in 8 bits."
        )
    del config.quantization_config
    return kind


class StoredLinear(nn.Linear):
    """A linear layer of a quantised checkpoint: its weight is in a store, `weight` on the device
    `meta`."""

    store: WeightStore

    def __init__(self, linear: nn.Linear, store: WeightStore):
        super().__init__(
            linear.in_features, linear.out_features, bias=False, device="meta", dtype=store.dtype
        )
        self.bias = linear.bias
        self.__dict__["store"] = store  # no part of the model until it is adapted, or left as it is
        self.train(linear.training)

    def read(self) -> Tensor:
        """The weight (o, i), dense."""
        return self.store.dequantize(self.store.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return frozen_linear(input, self.store, self.bias)

    def left(self, path: str) -> nn.Module:
        """The same layer where nothing adapts it, with its store a part of the model."""
        fixed = UnadaptedLinear(self.store, self.bias, path=path, seed=0)
        fixed.bias = self.bias  # itself: it may be trained
        return fixed.train(self.training)


class Packed:
    """The quantised matrices of a checkpoint.

    Args:
        names: of all of its tensors.
        read: a tensor by its name.

    Raises ValueError if none is quantised.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]):
        self._names, self._read = set(names), read
        four = {key.partition(_STATE)[0] for key in self._names if _STATE in key}
        eight = {f"{key.removesuffix('SCB')}weight" for key in self._names if key.endswith(".SCB")}
        self.keys = (four | eight) & self._names
        if not self.keys:
            raise ValueError(
                "its config.json has a quantization_config, but none of its weights is quantised; "
                "take it out"
            )
        self._states = {key: self._state(key) for key in four & self.keys}
        self.parts = {
            *(key for key in self._names if _STATE in key),
            *(f"{key}.{part}" for key in four for part in _PARTS),
            *(f"{key.removesuffix('weight')}{part}" for key in eight
              for part in ("SCB", "weight_format")),
        }  # fmt: skip

    def shape(self, key: str) -> tuple[int, int]:
        """(o, i) of the matrix `key`."""
        o, i = self._states[key]["shape"] if key in self._states else self._read(key).shape
        return o, i

    def store(self, key: str, dtype: torch.dtype) -> WeightStore:
        """The matrix `key`, as it is; `dtype` is what it counts as having been loaded in. Raises
        ValueError if its parts do not fit each other."""
        if key not in self._states:
            row = key.removesuffix("weight")
            if f"{row}weight_format" in self._names and int(self._read(f"{row}weight_format")):
                raise ValueError(f"{key} is in 8 bits, but not row by row")
            return Int8Store.of(self._read(key), self._read(f"{row}SCB"), dtype)
        state, nested = self._states[key], None
        if "nested_offset" in state:
            nested = (
                self._read(f"{key}.nested_absmax"),
                torch.tensor([state["nested_offset"]]),
                self._read(f"{key}.nested_quant_map"),
                state["nested_blocksize"],
            )
        return Nf4Store.of(
            self._read(key).contiguous().view(torch.uint8).reshape(-1),
            self._read(f"{key}.absmax"),
            self._read(f"{key}.quant_map"),
            shape=self.shape(key),
            dtype=dtype,
            block=state["blocksize"],
            nested=nested,
        )

    def _state(self, key: str) -> dict[str, Any]:
        name = next(name for name in self._names if name.startswith(f"{key}{_STATE}"))
        text = bytes(self._read(name).to(torch.uint8).flatten().tolist())
        state: dict[str, Any] = check(_QuantState, json.loads(text), name)
        return state


def tensors_of(path: str, store: WeightStore, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a checkpoint for the matrix `path`.weight, as bitsandbytes writes them."""
    key = f"{path}.weight"
    if isinstance(store, Int8Store):
        return {
            key: store.codes.data,
            f"{path}.SCB": store.absmax.data.view(torch.float32),
            f"{path}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    assert isinstance(store, Nf4Store)
    short = str(dtype).removeprefix("torch.")
    state = {"quant_type": "nf4", "blocksize": store.block, "dtype": short,
             "shape": list(store.shape)}  # fmt: skip
    found = {
        key: store.codes.data[:, None],
        f"{key}.quant_map": store.table.data.view(torch.float32),
    }
    if store.double_quantization:
        state |= {"nested_blocksize": store.nested_block, "nested_dtype": "float32",
                  "nested_offset": float(store.offset.data.view(torch.float32))}  # fmt: skip
        found |= {
            f"{key}.absmax": store.absmax.data,
            f"{key}.nested_absmax": store.nested_absmax.data.view(torch.float32),
            f"{key}.nested_quant_map": store.nested_table.data.view(torch.float32),
        }
    else:
        found[f"{key}.absmax"] = store.absmax.data.view(torch.float32)
    found[f"{key}{_STATE}nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return found


def configuration(store: type[WeightStore], dtype: torch.dtype, dense: list[str]) -> dict[str, Any]:
    """The quantization_config of such a checkpoint.

    Args:
        dense: paths of the linear layers that are not quantised.
    """
    short = str(dtype).removeprefix("torch.")
    eight = store is Int8Store
    return {
        "quant_method": "bitsandbytes", "load_in_8bit": eight, "load_in_4bit": not eight,
        "llm_int8_skip_modules": dense,
        **({} if eight else {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                             "bnb_4bit_compute_dtype": short}),
    }  # fmt: skip


def note(name: str, kind: Callable[[Tensor], WeightStore]) -> str:
    """The sentence on a quantised base."""
    bits = "8 bits" if getattr(kind, "func", kind) is Int8Store else "4 bits (NF4)"
    return f"{name} is kept in {bits}, as its checkpoint has it, under every variant."
