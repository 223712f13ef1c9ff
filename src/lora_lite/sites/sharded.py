"""Models whose parameters are spread over processes.

Tensors of FSDP2 (fully_shard) are gathered one at a time, and one process writes. FSDP1 (FullyShardedDataParallel, accelerate's
default) leaves flat pieces in the parameters' place, which nothing here can gather: it is refused.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import LoraLiteError


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a DTensor; then every process has to call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter of the module is spread over processes, by FSDP2 or FSDP1."""
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters()) or is_flat(module)


def is_flat(module: nn.Module) -> bool:
    """Whether FSDP1 keeps the module's parameters elsewhere: in the place of its matrices are flat pieces of one process."""
    pieces = [parameter for parameter in module.parameters() if getattr(parameter, "_fsdp_flattened", False)]
    return bool(pieces) and all(piece.ndim < 2 for piece in pieces)


def refuse_fsdp1(model: nn.Module, call: str) -> None:
    """Raise LoraLiteError where FSDP1 keeps parameters of this model. call: what was asked for, as code."""
    if is_flat(model):
        raise LoraLiteError(
            "The model is sharded by FullyShardedDataParallel.",
            expected="Whole tensors.",
            found="Each process has flat pieces of them.",
            fix="with torch.distributed.fsdp.FullyShardedDataParallel.summon_full_params(model, writeback=False):\n"
            f"        {call}",
        )


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
