"""A moment in which no forward of a model runs: what exchanges adapters or weights does it there.

Every forward therefore sees the state before or the state after, whole. Forwards pay nothing for it: a hook for all modules
stands only while somebody waits. Calls that begin meanwhile wait at it; those that had begun go on to their end.
"""

import contextlib
import gc
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..errors import LoraLiteError

PATIENCE = 60.0
"""Seconds that running forwards are waited for."""
STILL = 50
"""How often a look at the stacks of running threads is begun again."""
CALLS = ("_wrapped_call_impl", "_call_impl")
MODULE = nn.modules.module.__file__

turn = threading.Lock()
"""One change at a time."""
holding: set[int] = set()
"""Threads that have their turn: what they do inside is a part of it."""


class Gate:
    """Stops calls of modules of one family in other threads; those inside a call that had begun pass."""

    def __init__(self, model: nn.Module):
        self.model, self.owner = model, threading.get_ident()
        self.family = {id(module) for module in model.modules()}
        self.opened, self.held = threading.Event(), set[int]()  # threads that wait at the gate
        self.mine: Any = False  # whether it is this gate's turn
        self.handles: list[Any] = []

    def close(self) -> None:
        """When it is its turn. A line that takes something also says so: any line may be interrupted."""
        self.mine = turn.acquire()
        holding.add(self.owner)
        self.handles.append(register_module_forward_pre_hook(self))

    def open(self) -> None:
        self.opened.set()
        for handle in self.handles:
            handle.remove()
        holding.discard(self.owner)
        self.mine = turn.release() if self.mine else None

    def related(self, module: Any) -> bool:
        """Whether a module is a part of the model, or has it as a part."""
        return id(module) in self.family or (isinstance(module, nn.Module) and any(m is self.model for m in module.modules()))

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.opened.is_set() or torch.compiler.is_compiling() or threading.get_ident() == self.owner:
            return
        if self.related(module) and not self.running(sys._getframe(1), module):
            self.held.add(threading.get_ident())
            self.opened.wait()

    def running(self, frame: FrameType | None, called: Any = None) -> bool:
        """Whether a call of the family stands on this stack, other than the innermost of `called`."""
        while frame is not None:
            if frame.f_code.co_name in CALLS and frame.f_code.co_filename == MODULE:
                module = frame.f_locals.get("self")
                if module is not called and self.related(module):
                    return True
            frame = frame.f_back
        return False

    def busy(self) -> bool:
        """Whether another thread is inside a call of the family; True as well where its stack does not hold still."""
        interval = sys.getswitchinterval()
        sys.setswitchinterval(0.02)  # a frame that returns while its callers are looked through has none any more
        try:
            for _ in range(STILL):
                before = self.stacks()
                if any(ident not in self.held and self.running(frame) for ident, (frame, _) in before.items()):
                    return True
                if self.stacks() == before:
                    return False
            return True
        finally:
            sys.setswitchinterval(interval)

    def stacks(self) -> dict[int, tuple[FrameType, int]]:
        """{thread: its innermost frame and where that stands} of the other threads."""
        return {ident: (frame, frame.f_lasti) for ident, frame in running_frames().items() if ident != self.owner}


def running_frames() -> dict[int, FrameType]:
    """The innermost frame of every thread. Without collections: one in the midst may wait for a thread that waits for us,
    in CPython before 3.11.8 and 3.12.2 (its issue 106883).
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        if collecting:
            gc.enable()


@contextlib.contextmanager
def quiet(model: nn.Module, *, inside: bool = False) -> Iterator[None]:
    """Inside, no other thread runs the model; new calls of it wait for the end of the block.

    inside  True: let a call of the model in this very thread be, and do not wait for others there
    Raises LoraLiteError in the midst of a forward of this thread, and where others do not end within PATIENCE seconds.
    """
    gate = Gate(model)
    if gate.running(sys._getframe(1)):
        if inside:
            yield
            return
        raise LoraLiteError(
            f"A forward of {type(model).__name__} is running in this thread.",
            expected="A change of adapters or weights between two forwards.",
            fix="output = model(x)  # first, and then the change",
        )
    if gate.owner in holding or threading.active_count() == 1:
        yield
        return
    try:
        try:
            gate.close()
            deadline = time.monotonic() + PATIENCE
            while gate.busy():
                if time.monotonic() > deadline:
                    raise LoraLiteError(
                        f"Forwards of {type(model).__name__} are running in other threads, for {PATIENCE:g} s by now.",
                        expected="A moment between two forwards.",
                        fix="# let them end, then call again",
                    )
                time.sleep(0.0005)
            yield
        finally:
            gate.open()
    except BaseException:  # also an interruption of the line above
        gate.open()
        raise
