"""The rows that are timed: the frozen base, every variant in it, and peft's and bitsandbytes'.

A floor is the base alone: forward, loss, and backward to the embedded inputs, so that the gradient
runs through the whole stack and reaches no parameter. There is one for each way of keeping the
frozen weights, and each row is held against its own. All other rows are whole training steps:
forward, loss and the method's penalty, backward, AdamW (fused, for all) on what is trained, the
method's hooks, zero_grad. Token ids go in, so nothing is differentiated that training would not.
The same layers are adapted and the same head is trained by every method. Adapters are in training
mode, the base is not, so that its own dropout is off.

Steps are numbered from the middle of a run of 3000 whose rank allocators act every 100 steps: the
steps that are timed lie between two of them, so that every rank is the one asked for, and what an
allocator's own step costs is told apart.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import variants
from harness.config import build
from harness.models.base import BaseModel, Outline

FLOOR, FULL = "floor", "every parameter"
DENSE = "dense"
OF_BITSANDBYTES = "nf4"  # the store that its rows keep the base in
LABELS = ("negative", "positive")
ALPHA_OVER_RANK = 2  # alpha 16 at rank 8
LR = 1e-4  # of what has no rate of its own; it does not matter to the time
TOTAL_STEPS, INTERVAL = 3000, 100  # of the run, and from one step of an allocator to the next
FIRST_STEP = TOTAL_STEPS // 2 + 1
PEERS = ("AdaLoRA", "DoRA", "LoRA")  # peft's methods; a name that ends like two is the first's


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. A step is `passes` and then `update`, each with the step's number.

    Args:
        floor: the name of the row that this one is held against; None for a floor.
        peer: the name of the row of peft's counterpart, a floor's of bitsandbytes', or None.
        allocates: whether an allocator acts at multiples of INTERVAL.
    """

    name: str
    model: nn.Module
    passes: Callable[[int], None]
    update: Callable[[int], None] = lambda number: None
    floor: str | None = None
    peer: str | None = None
    allocates: bool = False
    compiled: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The settings and the model that all rows share.

    Args:
        batch: input_ids and attention_mask (rows, tokens), and labels, drawn at random.
        rank, dropout: of every method that has them; a dropout of 0 leaves its rows out.
        compiled: by torch.compile, all rows.
    """

    base: BaseModel
    batch: dict[str, Tensor]
    rank: int
    dropout: float
    compiled: bool = False

    # ---- floors ----------------------------------------------------------------------------------

    def floor(self, store: Callable[[Tensor], variants.WeightStore]) -> Row:
        """The base with its linear layers in stores."""
        model = self._copy()
        if store_name(store) != DENSE:
            variants.inject(model, _fixed(store), seed=0, head=self.base.head)
        return self._floor(model, floor_name(store))

    def _floor(self, model: PreTrainedModel, name: str) -> Row:
        model.requires_grad_(False)
        self._compile(model)
        inputs = dict(self.batch)
        embedding: nn.Module = model.get_input_embeddings()
        with torch.no_grad():
            embedded = embedding(inputs.pop("input_ids"))

        def passes(number: int) -> None:
            found = model(**inputs, inputs_embeds=embedded.detach().requires_grad_())
            found.loss.backward()

        return Row(name=name, model=model, passes=passes, compiled=self.compiled)

    # ---- ours ------------------------------------------------------------------------------------

    def variant(
        self, name: str, dropout: float = 0.0, active_frac: float = 1.0, dense: bool = False
    ) -> Row | None:
        """conf/variant/<name>.yaml; None if it has no dropout, or no ranks to lower, and should.

        Args:
            active_frac: of each layer's rank, how much is in use; below 1 no allocator runs.
            dense: by the definition, which forms W', instead of the fast path.
        """
        variant, uses_dropout = load_variant(name, self.rank, dropout)
        if dropout and not uses_dropout:
            return None
        model = self._copy()
        layers = variants.inject(model, variant, seed=0, head=self.base.head)
        for layer in layers.values():
            layer.train()
        label, allocator = _with_dropout(name, dropout), None
        if dense:
            label = f"{label}, W' formed"
            for layer in layers.values():
                layer.adapted = functools.partial(variants.AdapterLinear.adapted, layer)  # type: ignore[method-assign]
        if active_frac < 1.0:
            adaptive: list[Any] = [la for la in layers.values() if hasattr(la, "activate")]
            if not adaptive:
                return None
            k = max(1, round(active_frac * self.rank))
            label = f"{label}, rank {k} of {self.rank}"
            for layer in adaptive:
                B, A = layer.factors()
                B.detach()[:, k:] = 0.0  # as all is that is not in use
                A.detach()[k:] = 0.0
                layer.activate(k)
        elif (make := variant.allocator) is not None:
            if "interval" in getattr(make, "keywords", {}):
                make = functools.partial(make, interval=INTERVAL)
            allocator = make(layers, total_steps=TOTAL_STEPS, seed=0)
        return self._row(
            label,
            model,
            variant.groups(model, lr=variant.lr),
            floor=floor_name(variant.store),
            before=lambda step: variants.begin_step(layers, step),
            penalty=lambda: variant.penalty(layers),
            after=lambda optimizer, step: variants.after_step(layers, optimizer, step, allocator),
            allocates=allocator is not None,
        )

    def full(self) -> Row:
        """Plain fine-tuning of the whole model, embeddings included."""
        model = copy.deepcopy(self.base.model)  # its matrices are written
        return self._row(FULL, model, model.parameters(), floor=FLOOR)

    # ---- theirs ----------------------------------------------------------------------------------

    def peer(self, method: str, dropout: float, quantized: bool) -> Row:
        """peft's method on the same layers, with the same head; `quantized` over bitsandbytes."""
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer

        shared: dict[str, Any] = {
            "lora_alpha": ALPHA_OVER_RANK * self.rank,
            "lora_dropout": dropout,
            "target_modules": self._targets("linear"),
            "modules_to_save": list(self.base.head),
        }
        config: peft.PeftConfig
        if method == "AdaLoRA":  # the phases and the budget of the paper, as in conf/variant
            config = peft.AdaLoraConfig(
                init_r=self.rank,
                target_r=max(1, round(self.rank / 1.5)),
                tinit=round(0.15 * TOTAL_STEPS),
                tfinal=round(0.45 * TOTAL_STEPS),
                deltaT=INTERVAL,
                total_step=TOTAL_STEPS,
                orth_reg_weight=0.1,
                **shared,
            )
        else:
            config = peft.LoraConfig(
                r=self.rank,
                use_dora=method == "DoRA",
                target_parameters=self._targets("expert") or None,
                **shared,
            )
        base: Any = self._bitsandbytes() if quantized else self._copy()
        model = peft.get_peft_model(base, config).eval()
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.train()
        allocate = getattr(model.base_model, "update_and_allocate", None)
        name = f"peft {method}, bitsandbytes" if quantized else f"peft {method}"
        return self._row(
            _with_dropout(name, dropout),
            model,
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            floor=f"{FLOOR}, bitsandbytes" if quantized else FLOOR,
            after=lambda optimizer, step: allocate and allocate(step),
            allocates=allocate is not None,
        )

    def bitsandbytes_floor(self) -> Row:
        return self._floor(self._bitsandbytes(), f"{FLOOR}, bitsandbytes")

    def _bitsandbytes(self) -> PreTrainedModel:
        """The base with its linear layers in bitsandbytes' NF4, twice quantised as ours."""
        import bitsandbytes

        model = self._copy()
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft looks at it
        for path in self._targets("linear"):
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            quantized = bitsandbytes.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=linear.weight.dtype,
                compress_statistics=True,
                quant_type="nf4",
            )
            quantized.load_state_dict(linear.state_dict())
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, quantized.to(linear.weight.device))
        return model

    def _targets(self, kind: str) -> list[str]:
        """The modules of linear layers that variants adapt, or the parameters of experts."""
        layers = variants.inject(self._copy(), _fixed(), seed=0, head=self.base.head).values()
        sites = [layer.site for layer in layers if layer.site is not None]
        names = (s.owner if kind == "linear" else s.parameter for s in sites if s.kind == kind)
        return list(dict.fromkeys(names))

    @property
    def has_experts(self) -> bool:
        """True if experts are adapted. Of peft's methods LoRA without dropout alone can, and
        bitsandbytes quantises none; rows with W' formed are there instead."""
        return bool(self._targets("expert"))

    def _copy(self) -> PreTrainedModel:
        """The base with parameters of its own, whose matrices are the base's: all that has a copy
        freezes them, but for the head."""
        shared = {
            id(parameter): nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            for path, parameter in self.base.model.named_parameters()
            if parameter.ndim > 1 and not path.startswith(self.base.head)
        }
        return copy.deepcopy(self.base.model, shared)

    def _compile(self, model: nn.Module) -> None:
        if self.compiled:
            # Rows share code, and torch.compile gives up on code with more versions than this.
            torch._dynamo.config.recompile_limit = 1000
            model.compile()

    def _row(
        self,
        name: str,
        model: nn.Module,
        groups: Iterable[Any],
        *,
        floor: str,
        before: Callable[[int], Any] = lambda step: None,
        penalty: Callable[[], Tensor | None] = lambda: None,
        after: Callable[[torch.optim.Optimizer, int], Any] = lambda optimizer, step: None,
        allocates: bool = False,
    ) -> Row:
        optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
        self._compile(model)

        def passes(number: int) -> None:
            before(number)
            model(**self.batch).loss.backward()
            if (term := penalty()) is not None:
                term.backward()

        def update(number: int) -> None:
            optimizer.step()
            after(optimizer, number)
            optimizer.zero_grad()

        return Row(
            name=name,
            model=model,
            passes=passes,
            update=update,
            floor=floor,
            allocates=allocates,
            compiled=self.compiled,
        )


def _fixed(
    store: Callable[[Tensor], variants.WeightStore] = variants.DenseStore,
) -> variants.Variant:
    """A variant that trains nothing, over weights in stores."""
    return variants.Variant(
        name=FLOOR, lr=LR, store=store, adapter=variants.FixedLinear, groups=lambda model, lr: []
    )


# ---- names ---------------------------------------------------------------------------------------


def store_name(store: Callable[[Tensor], variants.WeightStore]) -> str:
    """dense, or as the class of the store is called: nf4."""
    kind = getattr(store, "func", store)
    return getattr(kind, "__name__", str(kind)).removesuffix("Store").lower()


def floor_name(store: Callable[[Tensor], variants.WeightStore]) -> str:
    return FLOOR if store_name(store) == DENSE else f"{FLOOR}, {store_name(store)}"


def peer_of(name: str) -> str | None:
    """peft's counterpart of a variant: the method that its first word ends in."""
    word = name.partition("_")[0]
    return next((peer for peer in PEERS if word.endswith(peer.lower())), None)


def _with_dropout(name: str, dropout: float) -> str:
    return f"{name}, dropout {dropout:g}" if dropout else name


# ---- what to time --------------------------------------------------------------------------------


def variant_names() -> list[str]:
    return sorted(file.stem for file in (build.CONF / "variant").glob("*.yaml"))


def load_variant(name: str, rank: int, dropout: float) -> tuple[variants.Variant, bool]:
    """The variant of conf/variant/<name>.yaml, and whether its adapter has a dropout.

    Raises ValueError on a name that has no such file.
    """
    settings = (f"rank={rank}", f"alpha={ALPHA_OVER_RANK * rank}", f"dropout={dropout}")
    config = build.compose([f"variant={name}", *settings])
    return build.make_variant(config), "dropout" in config["variant"]["adapter"]


def load_base(name: str, dtype: str = "float32") -> BaseModel:
    """The model of conf/model/<name>.yaml, kept in `dtype`: an encoder with a head of two labels,
    or a language model. Raises ValueError on a name that has no such file."""
    labels = LABELS if outline_base(name, dtype).head else None
    return build.load_base(build.compose([f"model={name}", f"model.dtype={dtype}"]), labels)


def outline_base(name: str, dtype: str = "float32") -> Outline:
    """The same of shapes alone, without a weight."""
    config = build.compose([f"model={name}", f"model.dtype={dtype}"])
    try:
        return build.outline_base(config, None)
    except ValueError:  # an encoder
        return build.outline_base(config, LABELS)


def draw_batch(base: BaseModel, rows: int, tokens: int) -> dict[str, Tensor]:
    """Random token ids without padding. Raises ValueError if the model is too short for them."""
    if tokens > base.max_tokens:
        raise ValueError(f"{base.name} takes at most {base.max_tokens} tokens; found {tokens}.")
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.model.get_input_embeddings().get_parameter("weight").shape[0]
    special = max(base.tokenizer.all_special_ids) + 1
    ids = torch.randint(special, vocabulary, (rows, tokens), generator=generator)
    labels = torch.randint(len(LABELS), (rows,), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels if base.kind == "encoder" else ids,
    }


def all_rows(
    bench: Bench,
    names: Sequence[str],
    *,
    peers: bool = True,
    active_fracs: Sequence[float] = (),
    full: bool = True,
) -> list[Row]:
    """The floors, each method of peft before the variants it is compared with, then all others.

    Args:
        peers: with peft's rows, and over bitsandbytes where it is installed.
        active_fracs: rows of their own for these parts of the rank, of the variants that have it.
        full: with plain fine-tuning of the whole model.
    """
    store_of = {name: load_variant(name, bench.rank, 0.0)[0].store for name in names}
    stores = {store_name(store): store for store in store_of.values()}
    rows = [bench.floor(variants.DenseStore)]
    rows += [bench.floor(store) for name, store in stores.items() if name != DENSE]
    experts = bench.has_experts
    quantized_peers = (
        peers and not experts and OF_BITSANDBYTES in stores
        and find_spec("bitsandbytes") is not None
    )  # fmt: skip
    if quantized_peers:
        theirs, ours = bench.bitsandbytes_floor(), floor_name(stores[OF_BITSANDBYTES])
        rows = [replace(row, peer=theirs.name) if row.name == ours else row for row in rows]
        rows.append(theirs)
    done: set[str] = set()
    for quantized in (False, True):
        of_kind = [name for name in names if (store_name(store_of[name]) != DENSE) == quantized]
        for method in (*PEERS[::-1], None):
            compared = [name for name in of_kind if peer_of(name) == method]
            for dropout in (0.0, bench.dropout) if bench.dropout else (0.0,):
                with_peer = method is not None and peers and (quantized_peers or not quantized)
                if experts and (method != "LoRA" or dropout):
                    with_peer = False
                asked = [(name, 1.0) for name in compared]
                if not dropout:
                    asked += [(name, frac) for name in compared for frac in active_fracs]
                found = [row for name, frac in asked if (row := bench.variant(name, dropout, frac))]
                if experts and not dropout:
                    found += [r for name in compared if (r := bench.variant(name, dense=True))]
                if found and with_peer and method:
                    rows.append(bench.peer(method, dropout, quantized))
                    found = [replace(row, peer=rows[-1].name) for row in found]
                rows += [row for row in found if row.name not in done]
                done |= {row.name for row in found}
    return [*rows, bench.full()] if full else rows
