"""One run on several processes: who does what, and what makes their results one result.

    torchrun --standalone --nproc-per-node 8 train.py variant=dora model=hf model.name=...

All processes walk through the same batches. Each computes its rows of a batch, and the gradients
of what is trained are summed in one all_reduce a step, after the last microstep and before
clipping; a process's loss counts by its share of the step's learned targets, so that the sum is
the mean over the whole step however unevenly the tokens lie. Masks of adapters' dropout belong to
rows of the batch, too. So the number of processes changes a run by rounding alone, and everything
that is decided from a gradient or a score is decided alike on all of them; `harness.loop.facts`
holds them to it. What differs is dropout of the base model's own, which is drawn from a stream for
each process, and all dropout under torch.compile.

    strategy=ddp     every process holds the whole model
    strategy=fsdp2   what is frozen in the blocks of the model is sharded among the processes by
                     torch's fully_shard, as it is stored; embeddings, the output layer and all
                     that is trained stay whole

Trained parameters are not sharded: singular values, importances and row norms need whole factors.
DistributedDataParallel is not used either. It would hide the reduction under the backward pass,
which for a few megabytes of adapters gains nothing; but it reduces after every microstep, averages
the processes' means, and renames all modules. fully_shard has no such price. Processes, rendezvous
and collectives are torch's.

Evaluation is dealt out batch by batch, generation too; what a language model has forgotten is
measured by every process on its own. The first process writes the run's folder and its W&B run.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.words import did_you_mean
from variants.layer import AdapterLinear

if TYPE_CHECKING:
    pass

STRATEGIES = ("ddp", "fsdp2")

Item = TypeVar("Item")
_store: dist.Store | None = None  # where the processes find each other


# ---- which process this is -----------------------------------------------------------------------


def rank() -> int:
    """This process's number, 0 for the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes that share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """True if this is the process that writes and prints."""
    return rank() == 0


def begin(strategy: str, *, batch_size: int, device: str, compiled: bool) -> None:
    """Join the processes that torchrun has started; alone without it.

    Afterwards `cuda` is this process's own GPU, and only the first process prints.

    Raises ValueError for settings that this number of processes cannot share.
    """
    global _store
    if strategy not in STRATEGIES:
        hint = did_you_mean(strategy, STRATEGIES)
        raise ValueError(f"strategy is {strategy}; it must be {' or '.join(STRATEGIES)}.{hint}")
    if not dist.is_torchelastic_launched():
        if strategy != "ddp":
            raise ValueError(
                f"strategy={strategy} shards the model among processes, and there is one; start "
                "them with torchrun --standalone --nproc-per-node N train.py."
            )
        return
    if strategy == "fsdp2" and compiled:
        raise ValueError("train.compile with strategy=fsdp2 is not supported; leave one out.")
    if batch_size % (size := int(os.environ["WORLD_SIZE"])):
        raise ValueError(
            f"train.batch_size is {batch_size}, the rows of a microstep on all processes; "
            f"it must be divisible by their number, {size}."
        )
    if device.startswith("cuda:"):
        raise ValueError(
            f"train.device is {device}, but under torchrun each process takes a GPU of its "
            "own; leave it out, or set CUDA_VISIBLE_DEVICES."
        )
    if device != "cpu" and torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"there are {os.environ['LOCAL_WORLD_SIZE']} processes on this machine and "
                f"{torch.cuda.device_count()} GPUs; give torchrun a smaller --nproc-per-node."
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        _store, own, size = next(dist.rendezvous("env://"))
        # Without a backend: gloo between CPUs, NCCL between GPUs.
        dist.init_process_group(store=dist.PrefixStore("run", _store), rank=own, world_size=size)
        if own > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as it lives)


def end() -> None:
    """Leave the others, when all has gone well. A process that fails just ends: torchrun ends the
    others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def say(message: str) -> None:
    """Print to stderr, once for however many processes have the same to say."""
    if _store is None:
        wanted = os.environ.get("RANK", "0") == "0" or not dist.is_torchelastic_launched()
    else:
        wanted = _store.add("said", 1) == 1
    if wanted:
        print(message, file=sys.stderr, flush=True)


def others_have_failed() -> bool:
    """True if a process has said why it ends; then what went wrong here is that it is gone."""
    return _store is not None and _store.add("said", 0) > 0


def described(strategy: str) -> dict[str, Any]:
    """For the record of a run's environment; nothing for a single process. It is no part of a run's
    identity: a run may be continued with another number of processes, or another strategy."""
    return {"processes": world_size(), "strategy": strategy} if world_size() > 1 else {}


# ---- agreement -----------------------------------------------------------------------------------


def wait() -> None:
    """Until all processes are here."""
    if world_size() > 1:
        gather(None)


def gather(value: Any) -> list[Any]:
    """Every process's JSON value, on all of them, the first's first. JSON keeps floats exactly."""
    if world_size() == 1:
        return [value]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(own)]))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(own)] = own
    found = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(found, padded)
    pairs = zip(found, lengths, strict=True)
    return [json.loads(bytes(text[: int(length)].tolist())) for text, length in pairs]


def agree(**values: Any) -> None:
    """Raise ValueError on every process unless these JSON values are the same on all of them."""
    first, *others = gather(values)
    for number, other in enumerate(others, start=1):
        if differing := [name for name in first if first[name] != other[name]]:
            raise ValueError(
                f"process {number} differs from the first in its {differing[0].replace('_', ' ')}: "
                "all processes need the same code, packages and files, and one outputs_dir."
            )


def share_out(work: Callable[[Item], Any], items: Sequence[Item]) -> list[Any]:
    """[work(item) for item in items], on every process, each doing its part of them.

    `work` returns JSON values. Processes left without an item repeat the last one: where the model
    is sharded, all must pass through it equally often.
    """
    if world_size() == 1 or not items:
        return [work(item) for item in items]
    rounds = math.ceil(len(items) / world_size())
    own = [items[min(n * world_size() + rank(), len(items) - 1)] for n in range(rounds)]
    parts = gather([work(item) for item in own])
    return [parts[n % world_size()][n // world_size()] for n in range(len(items))]


# ---- training ------------------------------------------------------------------------------------


@torch.no_grad()
def sum_over_processes(parameters: Sequence[nn.Parameter], numbers: Tensor) -> Tensor:
    """Replace each parameter's gradient by its sum over all processes, in one all_reduce that
    leaves the same bits on all of them; returns the sums of `numbers` (n,), rounded to float32, in
    their own dtype.

    A parameter without a gradient on any process keeps none, and optimisers pass it over.
    """
    if world_size() == 1:
        return numbers
    found = [float(parameter.grad is not None) for parameter in parameters]
    device = parameters[0].device
    pieces = [numbers.float().to(device), torch.tensor(found, device=device)]
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        pieces.append(gradient.reshape(-1))
    flat = torch.cat(pieces)
    dist.all_reduce(flat)
    totals, having, *sums = flat.split([len(piece) for piece in pieces])
    counts = found if all(found) else having.tolist()  # which waits for the device
    for parameter, count, total in zip(parameters, counts, sums, strict=True):
        if count > 0:
            parameter.grad = torch.empty_like(parameter).copy_(total.view_as(parameter))
    return totals.to(numbers)


# ---- the model -----------------------------------------------------------------------------------


def place(
    model: nn.Module, layers: Mapping[str, AdapterLinear], device: torch.device, strategy: str
) -> None:
    """Move the model to its device, or what this process holds of it. Parameters that are trained
    stay the same objects."""
    for layer in layers.values():
        layer.part = (rank(), world_size())
    if strategy == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard  # seconds to import

        mesh = init_device_mesh(device.type, (world_size(),))
        # A number cannot be sharded.
        whole = {p for p in model.parameters() if p.requires_grad or p.ndim == 0}
        for block in blocks(model):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model.to(device)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of the model's stacks: what lies in a ModuleList, but in no other. Raises
    ValueError if there are none."""
    stacks = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outermost = [
        stack
        for path, stack in stacks.items()
        if not any(path.startswith(f"{other}.") for other in stacks)
    ]
    found = [block for stack in outermost for block in stack]
    if not found:
        raise ValueError(
            f"strategy=fsdp2 finds no stack of layers in {type(model).__name__}; use strategy=ddp."
        )
    return found


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every process; any other as it is. All must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def held(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@contextlib.contextmanager
def unsharded(layer: nn.Module) -> Iterator[None]:
    """With all of a layer's parameters on every process, outside the model's own passes. All must
    come here."""
    sharded = {n: p for n, p in layer.named_parameters() if hasattr(p, "full_tensor")}

    def put(parameters: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            path, _, last = name.rpartition(".")
            setattr(layer.get_submodule(path), last, parameter)

    put({n: nn.Parameter(whole(p.detach()), requires_grad=False) for n, p in sharded.items()})
    try:
        yield
    finally:
        put(sharded)


# ---- the run's folder ----------------------------------------------------------------------------
