"""One run on several processes, as `accelerate launch` starts them: batches split, gradients averaged, the first measures."""

import functools
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll

WAIT = timedelta(hours=6)  # the others wait for the first while it scores


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def is_first() -> bool:
    return rank() == 0


@functools.cache
def accelerator(kind: str) -> Any:
    """Accelerate's handle on this process, on devices of that kind."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    return Accelerator(cpu=kind == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)])


def joined(device: str) -> str:
    """Meet the other processes, if there are any; the device of this one."""
    return device if size() == 1 else str(accelerator(torch.device(device).type).device)


def replica(model: nn.Module) -> nn.Module:
    """What training calls: the model, or with several processes Accelerate's wrapper, which averages gradients."""
    return model if size() == 1 else accelerator(next(model.parameters()).device.type).prepare(model)


def leave(device: str) -> None:
    """Let the wrappers and the other processes go: their threads would abort a process that ends around them."""
    if size() > 1:
        accelerator(torch.device(device).type).free_memory()
        accelerator(torch.device(device).type).end_training()


def part(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """(the rows of this process, the weight of their loss).

    A loss is the mean over the predicted tokens of its rows; with these weights the mean over processes is that of the batch.
    """
    if size() == 1:
        return dict(batch), 1.0
    rows = {key: tensor[rank() :: size()] for key, tensor in batch.items()}
    mine, all_ = (int((labels[:, 1:] != -100).sum()) for labels in (rows["labels"], batch["labels"]))
    if not mine:
        raise ll.LoraLiteError(
            f"A batch of {len(batch['labels'])} rows leaves process {rank()} of {size()} nothing to predict.",
            expected="Rows for every process.",
            fix=f"batch={2 * size()}",
        )
    return rows, size() * mine / all_


def mean(value: Tensor) -> Tensor:
    """Over the processes, the same in each."""
    if size() > 1:
        torch.distributed.all_reduce(value)
    return value / size()
