"""The base beside its adapters: what must not move, what was trained all the same, and what is put back at detach."""

import hashlib
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..contract.adapter import Adapter
from ..contract.attachment import Untouched
from ..errors import LoraLiteError, LoraLiteWarning, some
from ..sites.model import base_model, plain, unwrapped
from .fingerprint import digest, strided

SAMPLE = 64  # numbers of each tensor that no adapter stands on


def base_tensors(model: nn.Module, buffers: bool = False) -> dict[str, Tensor]:
    """{name: tensor} of the model less its adapters'."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            continue
        own = module.named_buffers(recurse=False) if buffers else module.named_parameters(recurse=False)
        found |= {f"{plain(path)}.{name}".lstrip("."): tensor for name, tensor in own}
    return found


def photographed(model: nn.Module) -> Untouched:
    """The base at its first attach."""
    return Untouched(
        {name: p.requires_grad for name, p in base_tensors(model).items()},
        {name: b.detach().clone() for name, b in base_tensors(model, buffers=True).items()},
        samples(model),
        {name: (id(p), p._version) for name, p in base_tensors(model).items() if not p.is_inference()},
    )


def samples(model: nn.Module, paths: Iterable[str] = ()) -> dict[str, str]:
    """{name: dtype and hash of a sample} of the base model's parameters, but those of layers at `paths` and of task heads.

    Equal numbers of a wider dtype have the same hash.
    """
    inside = {id(p) for p in base_model(model).parameters()}
    layers = tuple(f"{path}." for path in paths)
    return {
        name: f"{p.dtype} {digest(strided(p.detach(), SAMPLE).double())}"
        for name, p in base_tensors(model).items()
        if id(p) in inside
        and p.is_floating_point()
        and not p.is_meta
        and not hasattr(p, "full_tensor")
        and type(p) is nn.Parameter
        if not (layers and name.startswith(layers))
    }


def combined(found: dict[str, str], layers: Iterable[str]) -> str:
    """One hash for all samples but those of these layers."""
    own = tuple(f"{path}." for path in layers)
    kept = [(name, said.split()[1]) for name, said in sorted(found.items()) if not (own and name.startswith(own))]
    return hashlib.sha256(repr(kept).encode()).hexdigest()[:32]


def moved_buffers(model: nn.Module, base: Untouched) -> list[tuple[Tensor, Tensor]]:
    """[(buffer, what it held before the first attach)] of the base's buffers that moved while adapters were there."""
    found = []
    for name, buffer in base_tensors(model, buffers=True).items():
        before = base.buffers.get(name)
        if before is not None and before.shape == buffer.shape and not torch.equal(before.to(buffer), buffer):
            found.append((buffer, before))
    return found


def refuse_moving_statistics(model: nn.Module) -> None:
    """Raise where a forward in train mode would write into buffers of the base, such as running statistics."""
    moving = [
        plain(path)
        for path, module in model.named_modules()
        if module.training
        and (
            (
                isinstance(module, nn.modules.batchnorm._NormBase)
                and module.track_running_stats
                and module.running_mean is not None
            )
            or type(module).__name__ == "_SpectralNorm"
            or any(type(hook).__name__ == "SpectralNorm" for hook in module._forward_pre_hooks.values())
        )
    ]
    if moving:
        raise LoraLiteError(
            f"{some(moving)} would move in train mode: statistics of the base that no adapter holds.",
            expected="Layers with running statistics in eval mode while adapters are trained.",
            fix=f"for path in {moving}: model.get_submodule(path).eval()  # and after each model.train()"
            if moving != [""]
            else "model.eval()",
        )


def left_out(model: nn.Module, base: Untouched) -> list[str]:
    """Names of the base's parameters that are trained, or were written to, beside the adapters and of its buffers that moved:
    no file holds them.
    """
    model = unwrapped(model)
    asking = [name for name, p in base_tensors(model).items() if p.requires_grad]
    trained = list(dict.fromkeys([*asking, *written(model, base)]))
    moved = [
        name
        for name, b in base_tensors(model, buffers=True).items()
        if (before := base.buffers.get(name)) is not None
        and (before.shape != b.shape or not torch.equal(before.to(b), b))
        and name.rpartition(".")[2] not in LAZY
    ]
    return trained + moved


def written(model: nn.Module, base: Untouched) -> list[str]:
    """Names of the base's parameters whose numbers somebody changed since the first attach, also of adapted layers."""
    merged = [plain(path) for path, m in model.named_modules() if isinstance(m, Adapter) and m.original is not None]
    away = tuple(f"{path.rpartition('.')[0]}." for path in merged)
    own, found = base_tensors(model), []
    for name, p in own.items():
        known = base.versions.get(name)
        if known is not None and known[0] == id(p) and not p.is_inference() and p._version != known[1]:
            found.append(name)
    if set(found) == base.versions.keys():  # who trains writes to some; all at once is a reload, which the samples judge
        found = []
    for name, said in samples(model).items():
        before = said if name.startswith(away) else base.samples.get(name, said)
        if said != before and said.split()[0] == before.split()[0] and name not in found:
            found.append(name)
        elif said == before and name in found and own[name].numel() <= SAMPLE:
            found.remove(name)  # written to, with the numbers that it had
    return found


LAZY = ("inv_freq", "cos_cached", "sin_cached", "position_ids")
"""Buffers that models compute anew from their configuration as they run."""


def warn_left_out(model: nn.Module, base: Untouched, what: str) -> None:
    """Warn of trained parameters and moved statistics of the base that `what` does not hold, with a way to keep them."""
    if names := left_out(model, base):
        adapted = {plain(path).rpartition(".")[0] for path, m in model.named_modules() if isinstance(m, Adapter)}
        when = "before" if any(name.rpartition(".")[0] in adapted for name in names) else "after"  # load compares those
        few = f"{{k: v for k, v in model.state_dict().items() if k in {set(names)!r}}}"
        warnings.warn(
            f"{what} does not hold {some(names)} of the base, trained or moved beside the adapter. Keep them as well: "
            f"torch.save({few if len(names) <= 12 else 'model.state_dict()'}, 'beside.pt'), and "
            f"model.load_state_dict(torch.load('beside.pt'), strict=False) {when} ll.load",
            LoraLiteWarning,
            stacklevel=3,
        )
