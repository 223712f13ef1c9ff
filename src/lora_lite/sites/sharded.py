"""Models whose parameters FSDP2 has spread over processes: their tensors are gathered one at a time, and one process writes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a DTensor; then every process has to call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def is_sharded(module: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())


def on_first_process(work: Callable[[], object]) -> None:
    """Do the work on rank 0 alone; return when it is done, and raise what it raised, on every process."""
    outcome: list[Exception | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            work()
        except Exception as error:
            outcome = [error]
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]
