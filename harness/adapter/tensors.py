"""The tensors of an adapter's file: read whole and finite, and held against a model's."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.disk.read import check_is_file
from variants.layer import AdapterLinear

_NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, all finite. Raises ValueError, naming file and tensor."""
    check_is_file(path)
    try:
        tensors = load_file(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    except Exception as error:  # of as many kinds as a header can be wrong
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged: {reason}.") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in _NUMBERS:
            raise ValueError(f"{path}: {name} is {tensor.dtype}; factors are kept in no such type.")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {name} has values that are not finite.")
    return tensors


def check_state(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming a tensor, unless names, shapes and dtypes are as expected."""
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"{path} lacks the tensor {name}.")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(found[name].shape)}, and the model needs "
                f"{tuple(tensor.shape)}."
            )
        if found[name].dtype != tensor.dtype:
            raise ValueError(f"{path}: {name} is {found[name].dtype}, expected {tensor.dtype}.")
    if extra := sorted(set(found) - set(expected)):
        raise ValueError(f"{path} has a tensor {extra[0]}, which the model does not have.")


def head_and_biases(model: nn.Module, layers: Mapping[str, AdapterLinear]) -> dict[str, Tensor]:
    """The trained tensors besides the adapted layers' factors, by name in the unwrapped model."""
    adapted = {id(p) for layer in layers.values() for p in layer.parameters()}
    state = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapted
    }
    for path, layer in layers.items():
        if "bias" in layer.roles():
            state[f"{path}.bias"] = layer.roles()["bias"].detach()
    return {name: tensor.cpu().to(torch.float32).contiguous() for name, tensor in state.items()}
