"""One run by several processes: what `torchrun --nproc-per-node N recipes/<row>.py` starts.

Every process draws the same order of the images and the same augmentation of the whole batch, then trains on its share
of it. So the run does not depend on the number of processes: the same global batches, the same learning rate, every
image once an epoch, MixUp's and CutMix's partners from the whole batch, and a checkpoint that any number of processes
resumes from. (On CPUs, which have no synchronised batch norm, each process normalises by its own share.) The cost: each
process augments all the images, which takes a few hundredths of a step.

Outside torchrun there is one process, rank 0, and every function here does nothing.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.utils.distributed import distribute_bn, reduce_tensor, world_info_from_env
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from run_files import UserError

Result = TypeVar("Result")


@functools.cache
def join(device: str) -> torch.device:
    """Join the other processes, if torchrun started this one. Returns the device of this process, `device` a type.

    timm's `init_distributed_device` would do, but for restarts: when torchrun starts all processes again after one
    died, they get the same key-value store as before and look for each other where the dead ones were; so here each
    start has keys of its own. (On one machine: machines do not count restarts alike.)
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return torch.device(device)
    local_rank, rank, size = world_info_from_env()
    own = torch.device(device, local_rank if device == "cuda" else None)
    if device == "cuda":
        if local_rank >= (there := torch.cuda.device_count()):
            raise UserError(f"there are {there} GPUs here: give torchrun --nproc-per-node {there} at most")
        torch.cuda.set_device(own)
    store, _, _ = next(rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    patience = timedelta(days=7)  # the first process may wait for a run that trains this one's teacher
    backend = "nccl" if device == "cuda" else "gloo"
    card = own if device == "cuda" else None  # else NCCL guesses it by the rank among all machines
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience, device_id=card)
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 what goes well is told once
    return own


def leave() -> None:
    """End this process's part in the group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; the one with 0 writes files, shows the progress and is tracked."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first(compute: Callable[[], Result]) -> Result:
    """Compute in the first process alone and give all of them the result, so that they agree even if a file changes."""
    if size() == 1:
        return compute()
    result = [compute() if rank() == 0 else None]
    dist.broadcast_object_list(result)
    return result[0]


def barrier() -> None:
    """Wait until all processes are here."""
    if size() > 1:
        dist.barrier()


@contextmanager
def one_after_all() -> Iterator[None]:
    """Run the body in the first process of each machine, then in the others, which find what it downloaded."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        barrier()
    yield
    if first:
        barrier()


def share(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, float]:
    """This process's part of a batch, and what its mean loss counts for.

    The gradients of the processes are averaged. So that their average is the gradient of the batch's mean loss, however
    unevenly the batch falls, each loss counts for (images here) * (processes) / (images in the batch).

    Args:
        inputs: (views * B, ...), the views of all images one after the other.
        targets: (B,) or (B, classes).
    """
    if size() == 1:
        return inputs, targets, 1.0
    n = len(targets)
    start, end = (n * r // size() for r in (rank(), rank() + 1))
    weight = (end - start) * size() / n
    if start == end:  # each has to take part, with an image that counts for nothing but in batch norm on GPUs
        start, end = 0, 1
    views = inputs.view(-1, n, *inputs.shape[1:])[:, start:end]
    return views.flatten(0, 1), targets[start:end], weight


def mean(value: Tensor) -> Tensor:
    """The mean over the processes."""
    return reduce_tensor(value, size()) if size() > 1 else value


def shard(items: Sequence[Any]) -> Sequence[Any]:
    """Every `size()`-th item, from the rank on."""
    return items[rank() :: size()]


def gather(items: Sequence[Tensor]) -> Sequence[Tensor]:
    """The items of all processes, in the order in which `shard` dealt them."""
    if size() == 1:
        return items
    dealt = [None] * size()
    dist.all_gather_object(dealt, [item.clone() for item in items])  # a view would be sent with all that it is of
    return [hand[i] for i in range(len(dealt[0])) for hand in dealt if i < len(hand)]


def average_batch_norm(model: nn.Module) -> None:
    """Give all processes the mean of their running statistics."""
    if size() > 1:
        distribute_bn(model, size(), reduce=True)
