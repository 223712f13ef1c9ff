"""What an adapter costs beside the bare frozen model, and how exactly it keeps its promises. No variant is named here."""

import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.core.handle import Attached
from lora_lite.sites.layer import Layer, dense_weight

REPEATS = 5


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def forward(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss, with gradients down to the embeddings, so that the bare frozen model has the same work to do."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)  # type: ignore[operator]
    return model(inputs_embeds=embedded, labels=ids).loss


def forward_backward(model: nn.Module, ids: Tensor) -> None:
    forward(model, ids).backward()
    model.zero_grad(set_to_none=True)


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes of distinct storages, parameters and buffers aside, that a forward keeps for its backward."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, ids)
    loss.backward()
    model.zero_grad(set_to_none=True)
    return sum(kept.values())


def cost(model: nn.Module, bare: nn.Module, ids: Tensor) -> dict[str, float]:
    """Ratios to the bare frozen model: medians of interleaved repeats in this run, and bytes kept for backward."""
    times: dict[str, list[float]] = {"step": [], "bare step": [], "forward": [], "bare forward": []}

    def pure_forward(which: nn.Module) -> None:
        with torch.no_grad():
            which(input_ids=ids)

    for repeat in range(REPEATS + 1):
        for prefix, which in (("bare ", bare), ("", model)):
            step, pure = seconds(partial(forward_backward, which, ids)), seconds(partial(pure_forward, which))
            if repeat:  # the first round warms up
                times[f"{prefix}step"].append(step)
                times[f"{prefix}forward"].append(pure)
    median = {name: statistics.median(values) for name, values in times.items()}
    state = ll.status(model)
    return {
        "trainable": state.trainable,
        "frozen": state.frozen,
        "bare_step_seconds": median["bare step"],
        "step_ratio": median["step"] / median["bare step"],
        "forward_ratio": median["forward"] / median["bare forward"],
        "saved_for_backward_ratio": saved_bytes(model, ids) / saved_bytes(bare, ids),
    }


def peak_bytes(work: Callable[[], Any], cuda: bool = False) -> int:
    """Most bytes that `work` holds above what was there before, as the allocator counts them."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to the terminal
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = [event["args"] for event in events if event["name"] == "[memory]"]
    before = held[0]["Total Allocated"] - held[0]["Bytes"]
    return max(event["Total Allocated"] for event in held) - before


def memory(model: nn.Module, ids: Tensor) -> dict[str, int]:
    """What one forward + backward keeps and, at most, holds."""
    kept: list[int] = []
    peak = peak_bytes(lambda: kept.append(saved_bytes(model, ids)), ids.is_cuda)
    return {"saved_bytes": kept[0], "peak_bytes": peak}


def difference(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@torch.no_grad()
def fidelity(model: nn.Module, handle: Attached, bare: nn.Module, ids: Tensor, start_error: float) -> dict[str, Any]:
    """Errors relative to the largest logit, and the variant's own claims, all at the trained values.

    identity_at_start, coeff_zero, disabled, save_load: 0 means bit for bit. merge: only for variants with a dense form.
    """
    base, adapted = bare(input_ids=ids).logits, model(input_ids=ids).logits
    found: dict[str, Any] = {"identity_at_start": start_error}
    with ll.scale(model, 0.0):
        found["coeff_zero"] = difference(model(input_ids=ids).logits, base)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        handle.save(path)
        found["file_bytes"] = path.stat().st_size
        fresh = copy.deepcopy(bare)
        found["load_seconds"] = seconds(lambda: ll.load(fresh, path))
        found["save_load"] = difference(fresh(input_ids=ids).logits, adapted)
    claims = next(iter(handle.layers.values())).claims
    if claims.affine:
        ll.merge(model)
        found["merge"] = difference(model(input_ids=ids).logits, adapted)
        ll.unmerge(model)
        found["unmerge"] = difference(model(input_ids=ids).logits, adapted)
    return found | invariants(model, handle)


def invariants(model: nn.Module, handle: Attached) -> dict[str, float]:
    """What the claims promise, measured over all layers: the worst value."""
    worst: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        worst[name] = max(worst.get(name, 0.0), value)

    for path, adapter in handle.layers.items():
        claims, W = adapter.claims, dense_weight(cast(Layer, model.get_submodule(path))).double()
        if claims.affine:
            delta = ll.delta_weight(model, path).double()
            note("relative_change", float(delta.norm() / W.norm()))
            if claims.rank is not None:
                values = torch.linalg.svdvals(delta)
                note("rank", float((values > 1e-5 * values[0]).sum()) if values[0] > 0 else 0.0)
                note("rank_claimed", float(claims.rank(adapter.cfg)))
            if claims.contraction:
                # ||W' z|| <= ||W z|| for all z: the largest singular value of W' W^+ on the row space of W.
                note("amplification", float(torch.linalg.matrix_norm((W + delta) @ torch.linalg.pinv(W), ord=2)))
        if claims.isometry and adapter.changes_input():
            Q = adapter.forward_input(torch.eye(adapter.d_in, dtype=torch.float64, device=W.device))
            note("orthogonality_error", float((Q @ Q.T - torch.eye(adapter.d_in, device=W.device)).abs().max()))
        for name, value in adapter.report.items():
            note(name, value)
    return worst
