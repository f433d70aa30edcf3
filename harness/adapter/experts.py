"""The linear layers that PEFT takes for experts.

Where transformers keeps a mixture's experts in 3-D weights, PEFT rewrites the names that they had
in earlier adapters (peft/utils/transformers_weight_conversion.py), and so loses the LoRA of dense
and shared MLPs whose layers are called the same, with a warning of missing keys alone. It does so
for its LoRA only, for about thirty types of models.
"""

from collections.abc import Iterable

from torch import nn
from transformers import conversion_mapping

# The conversion that a type of model shares -> what its experts' matrices were called.
EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
# Type of model -> conversion, in transformers' words.
_CONVERSIONS = {**getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}),
                "mixtral": "mixtral"}  # fmt: skip


def read_as_experts(model: nn.Module, paths: Iterable[str]) -> str | None:
    """The first of the adapted layers whose name PEFT would rewrite; None if it leaves all."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    names = EXPERTS.get(_CONVERSIONS.get(kind, ""), ())
    return next((path for path in paths if path.rpartition(".")[2] in names), None)
