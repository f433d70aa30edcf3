"""All that training changes in a model, by name: what checkpoints and adapters hold."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from variants.layer import AdapterLinear


def trained_state(model: nn.Module, layers: Mapping[str, AdapterLinear]) -> dict[str, Tensor]:
    """All that training changes: each layer's `adapter_state`, and other trained parameters."""
    state = {
        f"{path}.{name}": tensor
        for path, layer in layers.items()
        for name, tensor in layer.adapter_state().items()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state.setdefault(name, parameter.detach())
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


@torch.no_grad()
def load_trained_state(
    model: nn.Module, layers: Mapping[str, AdapterLinear], state: Mapping[str, Tensor]
) -> None:
    """Take back what `trained_state` gave. Raises ValueError if the names differ."""
    expected = trained_state(model, layers)
    if set(expected) != set(state):
        differ = sorted(set(expected) ^ set(state))
        raise ValueError(f"the saved adapter is of another model or variant: {differ[0]} differs.")
    rest = dict(state)
    for path, layer in layers.items():
        own = {name: rest.pop(f"{path}.{name}") for name in layer.adapter_state()}
        layer.load_adapter_state(own)
    parameters = dict(model.named_parameters())
    for name, tensor in rest.items():
        parameters[name].copy_(tensor)
