"""The part `step` of bench-cost: the bare model, ours and PEFT's in turns on the same inputs, a row per variant and model."""

import copy
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

import lora_lite as ll
from benchmarks.common.measure import forward_backward, memory, seconds
from benchmarks.cost.limit import extra, least_seconds, multiply_adds, rates
from benchmarks.cost.settings import Cost, chosen
from benchmarks.cost.subjects import attached, build, compiled, peered, variant_config

SLOW = 4.0  # a subject this many times slower than the bare model gets two turns
Done = Callable[[str], None]  # told what was finished, or begins


def times(subjects: dict[str, nn.Module], ids: Tensor, repeats: int, enough: float = 0.0) -> dict[str, dict[str, list[float]]]:
    """{subject: {"forward" | "step": seconds of each turn}}, after a forward of each that warms up; `memory` has run steps.

    A round is two turns, the second in the opposite order behind the bare model: who comes after it pays for memory that it did
    not use, some hundredths of a step. At least `repeats` rounds, and more until they have taken `enough` seconds.
    """

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            model(input_ids=ids)

    def turn(order: Sequence[str]) -> None:
        for name in order:
            steps = found[name]["step"]
            if len(steps) >= 2 and steps[0] > SLOW * found["bare"]["step"][0]:
                continue
            steps.append(seconds(partial(forward_backward, subjects[name], ids)))
            found[name]["forward"].append(seconds(partial(forward, subjects[name])))

    found: dict[str, dict[str, list[float]]] = {name: {"forward": [], "step": []} for name in subjects}
    first, *others = subjects
    for subject in subjects.values():
        forward(subject)
    started, rounds = time.perf_counter(), 0
    while rounds < repeats or time.perf_counter() - started < enough:
        turn([first, *others])
        turn([first, *reversed(others)])
        rounds += 1
    return found


class Bare(NamedTuple):
    """The frozen model of one size, and what was measured of it once."""

    name: str
    model: nn.Module
    ids: Tensor
    rates: dict[str, float]
    multiply_adds: dict[str, int]
    memory: dict[str, int]


def bare(name: str, settings: Cost) -> Bare:
    model, ids = build(name, settings.device, settings.dtype), tokens(name, settings)
    rate = rates(cast(Any, model).config.hidden_size, ids, getattr(torch, settings.dtype))
    return Bare(name, model, ids, rate, multiply_adds(model, ids), memory(model, ids))


def compare(name: str, base: Bare, mode: str, settings: Cost) -> dict[str, Any]:
    """The row of one variant on one model."""
    model, ids = base.model, base.ids
    cfg = variant_config(name, model)
    ours, attach_seconds = attached(model, cfg, ids)
    subjects = {"bare": model, "ours": ours}
    record: dict[str, Any] = {"variant": name, "model": base.name, "mode": mode, "r": cfg.r, "bare": base.memory}
    record["ours"] = {"attach_seconds": attach_seconds, **memory(ours, ids)}
    if settings.peer == "peft" and (other := peered(model, cfg)) is not None:
        subjects["peft"] = other[0]
        record["peft"] = {"attach_seconds": other[1], **memory(other[0], ids)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        ll.save(ours, path)
        load_seconds = seconds(partial(ll.load, copy.deepcopy(model), path))
        record["ours"] |= {"file_bytes": path.stat().st_size, "load_seconds": load_seconds}
    timed = {key: compiled(subject, ids) for key, subject in subjects.items()} if mode == "compiled" else subjects
    for subject, found in times(timed, ids, settings.repeats, settings.seconds).items():
        record[subject] = record[subject] | found
    if "peft" in subjects and record["peft"]["step"][0] <= SLOW * record["bare"]["step"][0]:  # the others take minutes to count
        counted = multiply_adds(subjects["peft"], ids)
        record["peft"]["multiply_adds"] = {kind: n - base.multiply_adds[kind] for kind, n in counted.items()}
    record["extra"] = extra(ours, base.multiply_adds, ids)
    record["limit"] = {
        kind: statistics.median(record["bare"][kind]) + least_seconds(work, base.rates)
        for kind, work in record["extra"].items()
    }
    torch.compiler.reset()
    gc.collect()
    return record


def control(base: Bare, settings: Cost) -> dict[str, list[float]]:
    """Two copies of the bare model in the places of ours and PEFT's, one over the other: what the turns can tell apart."""
    copies = {"bare": base.model, "ours": copy.deepcopy(base.model), "peft": copy.deepcopy(base.model)}
    for model in copies.values():
        forward_backward(model, base.ids)
    found = times(copies, base.ids, settings.repeats, settings.seconds)
    return {kind: [a / b for a, b in zip(found["ours"][kind], found["peft"][kind])] for kind in ("forward", "step")}


def tokens(model_name: str, settings: Cost) -> Tensor:
    ids = torch.randint(0, 256, (1, settings.tokens), generator=torch.Generator().manual_seed(0))
    return (ids.reshape(2, -1) if model_name == "base" else ids).to(settings.device)


def step_rows(settings: Cost, record: dict[str, Any], done: Done) -> None:
    """Fill record["rows"], record["rates"] and record["control"]."""
    record |= {"rates": {}, "control": {}, "rows": []}
    for model_name in settings.models:
        base = bare(model_name, settings)
        record["rates"][model_name] = base.rates
        record["control"][model_name] = control(base, settings)
        for mode, name in itertools.product(settings.modes, chosen(settings)):
            record["rows"].append(compare(name, base, mode, settings))
            done(f"{name}, {model_name}")
