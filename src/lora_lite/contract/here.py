"""What belongs to the calls of one thread: the running model, the coefficients of open blocks, an adapter's lent coefficient.

A recomputation under checkpointing runs later, often in a thread of autograd's, where no block is open. So what a layer ran
with inside a checkpoint is noted beside that checkpoint's own object, which forward and recomputation have in common.
"""

import sys
import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHECKPOINT = "torch/utils/checkpoint.py"


class Setting(NamedTuple):
    """A coefficient as it was set; values: the distinct numbers of a tensor that is not trained."""

    coeff: float | Tensor
    values: Tensor | None = None


OFF = Setting(0.0)
"""Of a `disabled` block, whatever is set inside it."""


class Call(NamedTuple):
    """A running call of the model that `entry` stands on: whether its samples are sequences, and the call around it."""

    entry: object
    sequence: bool
    outer: Any


class Here(threading.local):
    """The state of one thread.

    call  the model that is running         lent  the adapter that was lent a coefficient, and that
    over  {key of a group: Setting, or {path: Setting}} of the open blocks, replaced as one object; None outside
    """

    def __init__(self) -> None:  # in every thread; torch.compile tells an attribute of the class from one that was set
        self.call: Call | None = None
        self.lent: tuple[object, Tensor] | None = None
        self.over: dict[int, Any] | None = None


HERE = Here()

noted: dict[int, dict[int, Setting]] = {}
"""{id of a checkpoint: {id of an adapter: what it ran with}} while a backward may still recompute it."""
blocks: set[int] = set()
"""Of the open `with ll.scale(...)`, in all threads."""


def setting(adapter: Any) -> Setting:
    """What an adapter runs with in this call: as its forward did in a recomputation, else the innermost block of this thread,
    else what all threads share.
    """
    over = HERE.over
    found: Any = None if over is None else over.get(adapter.group.key)
    if isinstance(found, dict):
        found = found.get(adapter.path)
    if found is None:
        found = Setting(adapter.set_coeff, adapter.set_values)
    if torch.compiler.is_compiling():  # asked first: compiled code would be made anew whenever the others change
        return found
    return as_before(adapter, found) if over is not None or noted or blocks else found


def as_before(adapter: Any, now: Setting) -> Setting:
    """In a recomputation what the forward noted, else `now`, noted for each checkpoint that is running."""
    running, again = checkpoints()
    known = noted.get(id(again), {}).get(id(adapter)) if again is not None else None
    found = now if known is None else known
    for one in running:
        if id(one) not in noted:
            weakref.finalize(one, noted.pop, id(one), None).atexit = False
        noted.setdefault(id(one), {})[id(adapter)] = found
    return found


def checkpoints() -> tuple[list[Any], Any]:
    """(those that run for the first time, the one that is recomputed or None), innermost first, by the call stack."""
    running: list[Any] = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith(CHECKPOINT):
            place = frame.f_locals
            if code.co_name == "unpack_hook" and "frame" in place:
                return running, place["frame"]
            if code.co_name == "backward" and "ctx" in place:
                return running, place["ctx"]
            if code.co_name == "forward" and "ctx" in place:
                running.append(place["ctx"])
            if code.co_name == "checkpoint" and (generator := place.get("gen")) is not None and generator.gi_frame is not None:
                running += [one for one in (generator.gi_frame.f_locals.get("new_frame"),) if one is not None]
        frame = frame.f_back
    return running, None
