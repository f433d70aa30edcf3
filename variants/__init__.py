"""LoRA variants as plugins of one layer. `inject` puts one into a model; it is in layer.py."""

from variants.adalora import AdaLoraLinear
from variants.adalora_budget import AdaLoraBudgetLinear, BudgetAllocator
from variants.adalora_energy import EnergyAllocator
from variants.dora import DoraLinear
from variants.full import FixedLinear, FullLinear
from variants.groups import by_role
from variants.inject import inject
from variants.int8 import Int8Store
from variants.layer import AdapterLinear, LowRankLinear
from variants.lora import LoraLinear
from variants.method import RankAllocator, Variant, after_step, begin_step
from variants.qlora import Nf4Store
from variants.store import DenseStore, WeightStore

__all__ = [
    "AdaLoraBudgetLinear", "AdaLoraLinear", "AdapterLinear", "BudgetAllocator", "DenseStore",
    "DoraLinear", "EnergyAllocator", "FixedLinear", "FullLinear", "Int8Store", "LoraLinear",
    "LowRankLinear",
    "Nf4Store", "RankAllocator", "Variant", "WeightStore", "after_step", "begin_step",
    "by_role", "inject",
]  # fmt: skip
