"""Ctrl-C at any line of a call that changes a model: it is as before, and the same call then finishes the work.

A tracer raises KeyboardInterrupt at one line of the library after another. Every day at some of them, in `just test-long` at
the first and the last time that each line is reached.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.contract import here
from lora_lite.contract.adapter import Adapter
from lora_lite.contract.rows import Entry
from lora_lite.testing import toy

SOURCE = str(Path(ll.__file__).parent)
VARIANTS = ("lora", "corda", "oft", "antipasto_ablate", "dora")
DAILY = 14  # points of a call and variant
X = toy.inputs(2, 3, toy.WIDTH)


def adapted(name: str) -> nn.Module:
    """An adapter that acts, on a model in train mode with a buffer that moves and parameters of several flags."""
    model = toy.toy().train()
    model.register_buffer("steps", torch.zeros(2))
    next(model.parameters()).requires_grad_(False)
    cls = ll.get(name)
    toy.perturb(toy.attached(model, cls, toy.small(cls)))
    model.steps.add_(1)
    return model


def data(name: str) -> Any:
    cls = ll.get(name)
    cfg = toy.small(cls)
    if any(":" in one for one in (*cls.needs(cfg), *cls.wants(cfg))):
        return {"positive": toy.batches(count=1), "negative": toy.batches(count=2)[1:]}
    return toy.batches(count=2) if cls.needs(cfg) or cls.wants(cfg) else None


def bare(name: str) -> nn.Module:
    model = toy.toy().train()
    next(model.parameters()).requires_grad_(False)
    return model


def merged(name: str) -> nn.Module:
    model = adapted(name)
    ll.merge(model)
    return model


def broken(name: str) -> nn.Module:
    model = adapted(name)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


def two(name: str) -> nn.Module:
    model = adapted(name)
    ll.attach(model, ll.config("lora", r=2), name="second")
    return model


def entered(block: Any) -> None:
    with block:
        pass


Call = tuple[Callable[[str], nn.Module], Callable[[nn.Module, str, Path], Any]]
CALLS: dict[str, Call] = {
    "attach": (bare, lambda model, name, _: ll.attach(model, toy.small(ll.get(name)), data(name))),
    "attach another": (adapted, lambda model, name, _: ll.attach(model, toy.small(ll.get(name)), data(name), name="b")),
    "load": (bare, lambda model, name, folder: ll.load(model, folder / "a.safetensors")),
    "restore": (two, lambda model, name, folder: handle(model).restore(folder / "a.safetensors")),
    "scale": (adapted, lambda model, name, _: ll.scale(model, 0.25)),
    "scale rows": (adapted, lambda model, name, _: ll.scale(model, torch.tensor([0.5, 1.0]))),
    "scale in a block": (adapted, lambda model, name, _: entered(ll.scale(model, 0.25))),
    "scaled": (adapted, lambda model, name, _: entered(ll.scaled(model, torch.tensor([0.5, 1.0])))),
    "disabled": (adapted, lambda model, name, _: entered(ll.disabled(model))),
    "merge": (adapted, lambda model, name, _: ll.merge(model)),
    "unmerge": (merged, lambda model, name, _: ll.unmerge(model)),
    "detach": (merged, lambda model, name, _: ll.detach(model)),
    "detach one": (two, lambda model, name, _: ll.detach(model, "default")),
    "apply": (adapted, lambda model, name, _: ll.apply(model, TAKEN[name], name="b")),
    "repair": (broken, lambda model, name, _: ll.repair(model)),
    "load_peft": (bare, lambda model, name, folder: ll.load_peft(model, folder / "peft")),
}
PASSING = ("scale in a block", "scaled", "disabled")
"""What leaves the model as it was also when it ends."""
TAKEN: dict[str, Any] = {}


def handle(model: nn.Module) -> Any:
    from lora_lite.core.handle import Attached

    found = {p.rpartition(".")[0]: m for p, m in model.named_modules() if isinstance(m, Adapter) and m.group.name == "default"}
    first = next(iter(found.values()))
    return Attached(model, "default", first.group.cfg, found, {})


def identity(model: nn.Module) -> list[Any]:
    """Everything that must be the very same after an interruption, with the numbers of every tensor."""
    found: list[Any] = [torch.get_rng_state().tolist(), torch.is_grad_enabled(), here.HERE.over, set(here.blocks)]
    found.append([len(nn.modules.module._global_forward_pre_hooks)])
    for path, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        noting = [h.__name__ for h in hooks if isinstance(getattr(h, "__self__", None), Entry)]
        assert noting in ([], ["leave", "enter"])  # they note calls, and may stay
        hooks = [h for h in hooks if not isinstance(getattr(h, "__self__", None), Entry)]
        found += [
            path,
            type(module),
            module.training,
            [(id(getattr(h, "__self__", h)), getattr(h, "__name__", "")) for h in hooks],
        ]
        found += [
            (name, id(p), p.requires_grad, p.detach().double().sum().item())
            for name, p in module._parameters.items()
            if p is not None
        ]
        found += [(name, id(b), b.double().sum().item()) for name, b in module._buffers.items() if b is not None]
        if isinstance(module, Adapter):
            found += [module.set_coeff, module.common, module.original, module.path, id(module.group)]
            found += [sorted(module.group.paths), len(module.group.handles), len(module.handles)]
    return found


def outcome(model: nn.Module) -> list[Any]:
    """What a finished call leaves, without the identity of objects."""
    model.eval()
    with torch.no_grad():
        found: list[Any] = [model(X)]
    found += [[(p, type(m).__name__, len(m._forward_hooks), len(m._forward_pre_hooks)) for p, m in model.named_modules()]]
    found += [[(name, p.requires_grad) for name, p in model.named_parameters()], *model.state_dict().values()]
    return found


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other)
    )


def traced(run: Callable[[], Any], at: int | None) -> list[tuple[str, int]]:
    """Lines of the library that `run` reaches, in order; KeyboardInterrupt is raised before the one numbered `at`."""
    lines: list[tuple[str, int]] = []

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if at is not None and len(lines) == at + 1:
                raise KeyboardInterrupt
        return on_line

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        return on_line if frame.f_code.co_filename.startswith(SOURCE) and "/testing/" not in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        run()
    finally:
        sys.settrace(before)
    return lines


def points(lines: list[tuple[str, int]], every: bool) -> list[int]:
    first = {line: k for k, line in reversed(list(enumerate(lines)))}
    last = {line: k for k, line in enumerate(lines)}
    found = sorted({*first.values(), *last.values()})
    if every or len(found) <= DAILY:
        return found
    return sorted({found[k * (len(found) - 1) // (DAILY - 1)] for k in range(DAILY)} | set(found[-3:]))


def interrupt_at_points(call: str, name: str, folder: Path, every: bool) -> int:
    """How many points were tried; each is judged."""
    source = adapted(name)
    source.steps.zero_()
    ll.save(source, folder / "a.safetensors")
    TAKEN[name] = ll.snapshot(source)
    if call == "load_peft":
        try:
            ll.export_peft(source, folder / "peft", plain=name != "lora", limit=1.0)
        except ll.LoraLiteError:
            pytest.skip("no export")
    made, run = CALLS[call]
    finished = made(name)
    run(finished, name, folder)
    want = outcome(finished)
    ahead = made(name)
    lines = traced(lambda: run(ahead, name, folder), None)
    tried = points(lines, every)
    for at in tried:
        model = made(name)
        before = identity(model)
        try:
            reached = traced(lambda: run(model, name, folder), at)  # noqa: B023
        except KeyboardInterrupt:
            pass
        else:  # another thread made no look at the stacks necessary, and the lines ended before
            assert len(reached) <= at
            assert same(outcome(model), want)
            continue
        found = identity(model)
        where = f"{call} of {name}, interrupted at {lines[at] if at < len(lines) else at}"
        if call == "scale in a block" and found != before:  # Python itself may be interrupted between the call and the block
            ll.scale(model, 0.25)
            assert identity(model) == found, where
            ll.scale(model, 1.0)
            found = identity(model)
        assert found == before, where
        run(model, name, folder)
        assert same(outcome(model), want), where
    return len(tried)


@pytest.mark.filterwarnings("ignore::lora_lite.LoraLiteWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored")  # a file that was opened just then is closed by Python
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["lora", *(pytest.param(name, marks=pytest.mark.long) for name in VARIANTS[1:])])
def test_an_interrupted_call_leaves_the_model_as_it_was_and_works_when_repeated(call, name, tmp_path):
    assert interrupt_at_points(call, name, tmp_path, every=False) >= 5


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::lora_lite.LoraLiteWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored")  # a file that was opened just then is closed by Python
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", VARIANTS)
def test_an_interruption_at_every_line(call, name, tmp_path):
    assert interrupt_at_points(call, name, tmp_path, every=True) >= 5
