"""The processes that train one network, as each of them sees the others; a process by itself is a group of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import distributed, nn

from models.errors import RecipeError


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Group:
    """Place of this process in its group.

    What the processes tell each other here are small tensors on the CPU, so that none of it waits for a GPU; gradients
    go through the network that `joined` makes.

    Attributes:
        rank: number of this process, from 0; process 0 validates, saves and reports.
        world: number of processes.
        asked: whether this process has been asked to stop.
    """

    rank: int = 0
    world: int = 1
    asked: Callable[[], bool] = _never

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the processes, element by element, of a tensor on the CPU that has one shape in all of them."""
        return self._reduced(values, distributed.ReduceOp.SUM)

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """Maximum over the processes, as `total`."""
        return self._reduced(values, distributed.ReduceOp.MAX)

    def _reduced(self, values: torch.Tensor, how: Any) -> torch.Tensor:
        values = values.clone()
        if self.world > 1:
            distributed.all_reduce(values, how)
        return values

    def agrees(self, requested: bool) -> bool:
        """Whether any process is to stop: the same answer in all of them, so that all stop after the same step.

        Here processes wait for the one that validates.
        """
        if self.world == 1:
            return requested
        return bool(self.largest(torch.tensor(int(requested or self.asked()))))

    def joined(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The network on its device; its gradients are sums over the processes, and it begins as process 0's does.

        BatchNorm takes the statistics of all processes on GPUs, and of this process's share on a CPU, for which torch
        has no synchronised one.
        """
        if self.world == 1:
            return model
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # DDP shares statistics at its beginning only where it does at each step too; frozen ones come with the weights.
        for statistic in model.to(device).buffers():
            distributed.broadcast(statistic, src=0)
        # A process may have nothing for a mask head to learn from. With unused parameters looked for, DDP does not sort
        # gradients anew after its first step either: a resumed run adds them in the order of an undisturbed one.
        joined = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
        # Losses are parts of the whole batch's. DDP by itself takes the mean, for which they would have to be larger,
        # which float16 does not bear.
        joined.register_comm_hook(None, lambda state, bucket: _added(bucket))
        return joined


def _added(bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    work = distributed.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


ALONE = Group()


class Batches(Protocol):
    """Training examples: ``batches[step]`` is a pure function of the step; ``len`` is an epoch."""

    def __getitem__(self, step: int) -> Any: ...

    def __len__(self) -> int: ...


class SharedBatches(Batches, Protocol):
    """Batches that several processes share."""

    def share(self, step: int, rank: int, world: int) -> Any:
        """What falls to process ``rank`` of ``world`` of the batch of a step."""


@dataclass(frozen=True)
class _Share:
    batches: SharedBatches
    group: Group

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Any:
        return self.batches.share(step, self.group.rank, self.group.world)


def own_share(batches: Batches | SharedBatches, group: Group) -> Batches:
    """This process's part of each batch: all of it where it is alone."""
    return batches if group.world == 1 else _Share(cast(SharedBatches, batches), group)


def check_processes(number: int, device: str, batch_size: int) -> None:
    """Refuse numbers of processes (``--num-gpus``) that a device (`pick_device`) or a batch has no room for.

    Raises:
        RecipeError: saying which.
    """
    if number == 1:
        return
    if device.startswith("cuda") and number > torch.cuda.device_count():
        raise RecipeError(f"--num-gpus {number}: there are {torch.cuda.device_count()}")
    if device.startswith("cuda:"):
        raise RecipeError(f"--num-gpus {number} with --device {device}: takes the first {number} GPUs; use --device cuda")
    if number > batch_size:
        raise RecipeError(f"--num-gpus {number}: more than the {batch_size} images of a batch")


def weighted(losses: dict[str, torch.Tensor], shares: Sequence[float]) -> dict[str, torch.Tensor]:
    """Losses that are means over this process's items, as parts of the means over all items: they add up to those.

    Args:
        shares: of all items those that this process has, one for each loss.
    """
    # A mean over no items is no number. It counts nothing, but its gradients, all zero, are waited for.
    return {
        name: (loss if share else torch.nan_to_num(loss)) * share
        for (name, loss), share in zip(losses.items(), shares, strict=True)
    }
