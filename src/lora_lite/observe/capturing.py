"""capture: record what a forward pass shows, for objectives and geometry, without changing the model.

Inside the block hooks of our own stand on the model. They keep references and compute nothing, so that checkpointing repeats
nothing and autocast decides nothing; all arithmetic happens afterwards.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..calibration.calls import ambient, of_this_thread
from ..core import finding
from ..core.coefficients import disabled
from ..errors import LoraLiteError, closest, some
from ..sites.model import is_compiled, plain, unwrapped
from .attention import Call, recorded
from .objectives.base import NEEDS, Summand
from .seen import Forward, Seen, token_mask, version

DECODER_MASK = "decoder_attention_mask"
Handles = list[torch.utils.hooks.RemovableHandle]


@contextlib.contextmanager
def capture(
    model: nn.Module,
    objective: Summand | Set[str],
    *,
    layers: int | str | Iterable[int | str] | None = None,
    mask: Tensor | None = None,
    accumulate: bool = False,
) -> Iterator[Seen]:
    """Record the forward pass inside the block: `with ll.capture(model, objective) as seen: out = model(**batch)`.

    objective   what is recorded follows from its `needs`; or a set of such names. With nothing needed, nothing is done
    layers      hidden states are the outputs of these blocks (indices: the first number in the path) or modules (paths), and
                an objective is the mean over them. None: the input of the output head, behind the final norm
    mask        (B, T), 1 for tokens; None: the `attention_mask` that the model is called with, or its `decoder_attention_mask`
                where it takes one; else every token counts
    accumulate  more than one forward pass; objectives are means over them

    Call `backward` after the block. Autocast, non-reentrant checkpointing and torch.compile (which compiles once more for the
    block, without a graph break) are fine, and what other threads call is not recorded. Raises LoraLiteError, naming the
    objective, for reentrant checkpointing, attention maps of a model that calls no scaled_dot_product_attention, hidden states
    of a model without an output head, a mask that does not fit, no forward pass or a second one, and for adapters that are
    merged or whose hooks are gone.
    """
    asked = askers(objective)
    root = unwrapped(model)
    seen = Seen(root, asked)
    if not asked:
        yield seen
        return
    finding.refuse_lost(finding.adapters(root))
    if torch.is_grad_enabled():
        finding.refuse_merged(finding.adapters(root))
    if layers is not None and "hidden" not in asked:
        raise LoraLiteError(
            f"layers={layers!r} selects hidden states.", expected="Nothing here needs them.", found=f"Needs: {sorted(asked)}."
        )
    places = hidden_places(root, layers, asked["hidden"]) if "hidden" in asked else {}
    if mask is None:
        refuse_encoder(root, places)
    with contextlib.ExitStack() as stack:
        calls = stack.enter_context(recorded(root)) if "attention" in asked else []
        if is_compiled(model) or any(is_compiled(module) for module in root.modules()):
            stack.enter_context(Noticed())
        recorder = Recorder(root, seen, calls, given=None if mask is None else token_mask(mask), accumulate=accumulate)
        stack.callback(recorder.remove)
        recorder.watch(places)
        yield seen
    seen.check()


class Noticed(TorchFunctionMode):
    """Changes nothing. torch.compile guards the stack of modes and not the hooks: with another mode it traces ours as well."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Recorder:
    """Our hooks. What runs outside a forward of the whole model, such as a recomputation, is not recorded."""

    def __init__(self, root: nn.Module, seen: Seen, calls: list[Call], given: Tensor | None, accumulate: bool):
        self.seen, self.calls, self.given, self.accumulate = seen, calls, given, accumulate
        self.parameters = parameters(root)
        self.of_decoder = DECODER_MASK in self.parameters
        self.running: Forward | None = None
        self.resting = False
        self.before = 0
        self.handles: Handles = [
            root.register_forward_pre_hook(of_this_thread(self.enter), with_kwargs=True, prepend=True),
            root.register_forward_hook(of_this_thread(self.leave)),
        ]

    def watch(self, places: dict[str, tuple[nn.Module, bool]]) -> None:
        for module, of_input in places.values():
            if of_input:
                read = of_this_thread(self.input_of)
                self.handles.append(module.register_forward_pre_hook(read, with_kwargs=True, prepend=True))
            else:
                self.handles.append(module.register_forward_hook(of_this_thread(self.output_of)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.resting:
            return
        if self.seen.forwards and not self.accumulate:
            raise LoraLiteError(
                "A second forward pass inside one capture block.",
                expected="One; a loss of two parts makes two. Text is generated outside the block.",
                fix="ll.capture(model, objective, accumulate=True)  # objectives are means over the passes",
            )
        mask = self.given
        if mask is None:
            batch = {**dict(zip(self.parameters, args)), **kwargs}
            mask = batch.get(DECODER_MASK if self.of_decoder else "attention_mask")
        again = functools.partial(self.base_calls, module, args, kwargs, ambient(self.seen.device.type))
        self.running = Forward(mask, torch.is_grad_enabled(), of_decoder=self.of_decoder, base_calls=again)
        self.before = len(self.calls)

    def base_calls(self, *call: Any) -> list[Call]:
        self.resting = True
        try:
            return base_calls(*call)
        finally:
            self.resting = False

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.running is not None:
            self.running.calls = self.calls[self.before :]
            self.seen.forwards.append(self.running)
            self.running = None

    def input_of(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.keep(args[0] if args else next(iter(kwargs.values())))

    def output_of(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.keep(output if isinstance(output, Tensor) else output[0])

    def keep(self, hidden: Tensor) -> None:
        if self.running is not None:
            self.running.hidden.append(hidden)
            self.running.versions.append(version(hidden))
            self.running.without |= self.running.with_grad and not torch.is_grad_enabled()


@torch.no_grad()
def base_calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], autocast: torch.autocast) -> list[Call]:
    """The attention calls of a pass with the adapters off. Dropout draws other numbers, from a stream that is put back."""
    drawing = {p.device for p in model.parameters() if p.device.type != "cpu"}  # by default all devices, with a warning
    with disabled(model), torch.random.fork_rng(drawing), autocast, recorded(model) as calls:
        model(*args, **kwargs)
    return calls


def askers(objective: Summand | Set[str]) -> dict[str, str]:
    """{need: who asks for it}. Raises LoraLiteError for what is neither an objective nor a set of known needs."""
    if isinstance(objective, Summand):
        who: dict[str, list[str]] = {}
        for name, term in objective.named.items():
            for need in term.needs:
                who.setdefault(need, []).append(repr(name))
        kind = {need: "objective" if len(names) == 1 else "sum of" for need, names in who.items()}
        return {need: f"The {kind[need]} {' and '.join(names)}" for need, names in who.items()}
    if isinstance(objective, (str, dict)) or not isinstance(objective, Iterable):
        raise LoraLiteError(
            f"{repr(objective) if isinstance(objective, str) else f'A {type(objective).__name__}'} is nothing to capture for.",
            expected="An objective, or a set of needs.",
            fix=f"ll.capture(model, ll.objectives.parse({objective!r}))"
            if isinstance(objective, str)
            else 'll.capture(model, {"hidden"})',
        )
    for need in objective:
        if need not in NEEDS:
            raise LoraLiteError(
                f"There is no need {need!r}.", found=closest(str(need), NEEDS), fix='ll.capture(model, {"hidden"})'
            )
    return dict.fromkeys(objective, "The capture")


def hidden_places(root: nn.Module, layers: Any, who: str) -> dict[str, tuple[nn.Module, bool]]:
    """{path: (module, whether its input is meant)} that show the hidden states."""
    modules = {plain(path): module for path, module in root.named_modules()}
    blocks: dict[int, list[str]] = {}
    for path in modules:
        if path.rpartition(".")[2].isdecimal() and not any(name.isdecimal() for name in path.split(".")[:-1]):
            blocks.setdefault(int(path.rpartition(".")[2]), []).append(path)
    if layers is None:
        head = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None  # type: ignore[operator]
        if not isinstance(head, nn.Module):
            raise LoraLiteError(
                f"{who} needs hidden states, and {type(root).__name__} names no output head.",
                expected="Blocks or modules whose output is meant.",
                found=f"Blocks: {some(map(str, sorted(blocks)))}. Modules: {some(dict(root.named_children()))}.",
                fix=f"ll.capture(model, objective, layers=({max(blocks) if blocks else repr(list(modules)[-1])},))",
            )
        return {"": (head, True)}
    wanted = [layers] if isinstance(layers, (int, str)) else list(layers)
    if not wanted:
        raise LoraLiteError("layers=() selects nothing.", expected="Block indices or paths of modules.", fix="layers=(0, 1)")
    return {path: (modules[path], False) for path in (place(layer, modules, blocks) for layer in wanted)}


def parameters(root: nn.Module) -> list[str]:
    return list(inspect.signature(root.forward).parameters)


def refuse_encoder(root: nn.Module, places: dict[str, tuple[nn.Module, bool]]) -> None:
    """Raise LoraLiteError for modules of an encoder where the mask that is read is that of the decoder beside it."""
    encoder = root.get_encoder() if hasattr(root, "get_encoder") else None  # type: ignore[operator]
    if not isinstance(encoder, nn.Module) or DECODER_MASK not in parameters(root):
        return
    if inside := [path for path, (module, _) in places.items() if module in set(encoder.modules())]:
        raise LoraLiteError(
            f"layers: {some(inside)} belongs to the encoder.",
            expected="Modules of the decoder, whose mask is read.",
            fix="ll.capture(model, objective, layers=layers, mask=attention_mask)",
        )


def place(layer: int | str, modules: dict[str, nn.Module], blocks: dict[int, list[str]]) -> str:
    if isinstance(layer, int):
        paths = blocks.get(layer, [])
        if len(paths) == 1:
            return paths[0]
        raise LoraLiteError(
            f"{f'Several modules are block {layer}: {some(paths)}' if paths else f'There is no block {layer}'}.",
            found="" if paths else f"Blocks: {some(map(str, sorted(blocks)))}.",
            fix=f"layers=({(paths or list(modules)[-1:])[0]!r},)  # the path of a module",
        )
    if layer not in modules:
        raise LoraLiteError(
            f"layers: there is no module {layer!r}.", found=closest(layer, filter(None, modules)), fix="layers=(0, 1)"
        )
    return layer
