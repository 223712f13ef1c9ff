"""just bench-cost [key=value ...]: what every variant costs beside the bare frozen model and beside PEFT, in one run.

Parts: step, for each model and variant three copies of one model, the bare one, ours and PEFT's, take turns in one process on
the same inputs: forward without gradients, forward + backward, bytes kept for backward, peak memory. attach, starts from the
weights and from data; growth, how they grow; large, at an 8B model's sizes; start, import, attach, save and load.
Ranks of step: r=16 for low-rank methods, 8 where that is the config's default or the method asks for it.

Keys: parts=step,attach,growth,start variants=lora,dora models=base,d512,d1024 repeats=2 seconds=2 tokens=512
peer=peft|none modes=eager,compiled device=cpu|cuda dtype=float32|bfloat16 out=FOLDER (default benchmarks/runs).
A row takes `repeats` rounds of two turns at least, and as many as go into `seconds`. Models 0.6B, 1.7B and 8B have the shapes
of Qwen3 and random weights; they want device=cuda dtype=bfloat16.
Writes cost.json, after every row, so that an interrupted run keeps what it has, and cost.png.
"""

import copy
import dataclasses
import gc
import itertools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import lora_lite as ll
from benchmarks.common.measure import forward_backward, memory, seconds
from benchmarks.common.options import Options, command, folder
from benchmarks.common.places import RUNS
from benchmarks.common.records import environment, write_json
from benchmarks.cost import attach as cost_attach
from benchmarks.cost import start as cost_start
from benchmarks.cost.limit import extra, least_seconds, multiply_adds, rates
from benchmarks.cost.peers import peer_config
from benchmarks.cost.report import plot, prose, table
from benchmarks.embedded.run import Settings, fitting, load_base
from lora_lite.contract.registry import variant_of
from lora_lite.errors import closest

RANK = {"hra": 8, "loha": 8, "lokr": 8, "lora_ga": 8, "corda": 16}
SLOW = 4.0  # a subject this many times slower than the bare model gets two turns


class Shape(NamedTuple):
    """Of a Qwen3 with random weights."""

    width: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    head: int = 128
    vocabulary: int = 151936


SHAPES = {
    "d512": Shape(512, 1536, 2, 8, 4, 64, 512),
    "d1024": Shape(1024, 3072, 2, 16, 8, 64, 512),
    "0.6B": Shape(1024, 3072, 28, 16, 8),
    "1.7B": Shape(2048, 6144, 28, 16, 8),
    "8B": Shape(4096, 12288, 36, 32, 8),
}
MODELS = ("base", *SHAPES)
PARTS = ("step", "attach", "growth", "large", "start")


@dataclass(frozen=True, kw_only=True)
class Cost(Options):
    """variants, models, modes, seconds are of the part step; variants: all, or names; tokens: in two rows on the base."""

    parts: tuple[str, ...] = ("step", "attach", "growth", "start")
    variants: tuple[str, ...] = ("all",)
    models: tuple[str, ...] = ("base", "d512", "d1024")
    modes: tuple[str, ...] = ("eager",)
    repeats: int = 2
    seconds: float = 2.0
    tokens: int = 512
    peer: str = "peft"
    device: str = "cpu"
    dtype: str = "float32"
    out: str = str(RUNS)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {
            "parts": PARTS,
            "variants": ("all", *ll.names()),
            "models": MODELS,
            "modes": ("eager", "compiled"),
            "peer": ("peft", "none"),
            "device": ("cpu", *(["cuda"] if torch.cuda.is_available() else [])),
            "dtype": ("float32", "bfloat16"),
        }
        for name, lawful in known.items():
            value = getattr(self, name)
            for word in value if isinstance(value, tuple) else (value,):
                if word not in lawful:
                    raise ll.LoraLiteError(f"{name}={word!r}", found=closest(word, lawful), fix=f"{name}={lawful[0]}")


def build(name: str, device: str = "cpu", dtype: str = "float32") -> nn.Module:
    """The embedded base, or a Qwen3 of that shape with random weights; frozen, in eval mode."""
    if name == "base":
        return load_base(Settings(device=device, base_dtype=dtype))[0]
    shape = SHAPES[name]
    config = transformers.Qwen3Config(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head, use_cache=False,
        dtype=getattr(torch, dtype),
    )  # fmt: skip
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def variant_config(name: str, model: nn.Module) -> ll.AdapterConfig:
    """Rank 16 for methods with a small rank; a large default, which a basis or a random pair needs, as far as it fits."""
    cfg = ll.config(name)
    if cfg.r is not None and (cfg.r <= 16 or name in RANK):
        cfg = dataclasses.replace(cfg, r=RANK.get(name, 16))
    return fitting(model, cfg)


def batches(ids: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids}] * 2


def attached(model: nn.Module, cfg: ll.AdapterConfig, ids: Tensor) -> tuple[nn.Module, float]:
    """A copy with our adapter, and the seconds that attaching took."""
    ours, data = copy.deepcopy(model), batches(ids) if variant_of(cfg).needs(cfg) else None
    return ours, seconds(lambda: ll.attach(ours, cfg, data))


def peered(model: nn.Module, cfg: ll.AdapterConfig) -> tuple[nn.Module, float] | None:
    """A copy with PEFT's adapter of the same method, and the seconds; None where there is none."""
    import peft

    leaves = sorted({path.rpartition(".")[2] for path in ll.find_targets(model, cfg)})
    config = peer_config(cfg, leaves)
    if config is None:
        return None
    theirs, made = copy.deepcopy(model), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken = seconds(lambda: made.append(peft.get_peft_model(theirs, config)))
    return made[0].eval(), taken


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


def compiled(model: nn.Module, ids: Tensor) -> nn.Module:
    """The compiled model, which has run a step."""
    fast = cast(nn.Module, torch.compile(model))
    forward_backward(fast, ids)
    return fast


def tokens(model_name: str, settings: Cost) -> Tensor:
    ids = torch.randint(0, 256, (1, settings.tokens), generator=torch.Generator().manual_seed(0))
    return (ids.reshape(2, -1) if model_name == "base" else ids).to(settings.device)


Done = Callable[[str], None]  # told what was finished, or begins


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


def chosen(settings: Cost) -> tuple[str, ...]:
    return tuple(ll.names()) if "all" in settings.variants else settings.variants


def run(settings: Cost, console: Console) -> dict[str, Any]:
    attach = cost_attach.Attach(peer=settings.peer, tokens=settings.tokens, threads=torch.get_num_threads())
    record: dict[str, Any] = {
        "benchmark": "cost",
        "settings": dataclasses.asdict(settings) | {"out": None},
        "environment": environment(),
        "attach": {"settings": dataclasses.asdict(attach)},
        "wall_seconds": {},
    }
    measured: dict[str, Callable[[Done], Any]] = {
        "step": lambda done: step_rows(settings, record, done),
        "attach": lambda done: record["attach"].update(rows=cost_attach.attach_rows(attach, done)),
        "growth": lambda done: record["attach"].update(growth=cost_attach.growth_rows(attach, done)),
        "large": lambda done: record["attach"].update(large=cost_attach.large_rows(attach, done)),
        "start": lambda done: record.update(start=cost_start.start_rows(settings)),
    }
    out = folder(settings.out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for part in settings.parts:
            rows = len(chosen(settings)) * len(settings.models) * len(settings.modes)
            total = {"step": rows, "start": 1}.get(part) or cost_attach.count(attach, part)
            task, started = progress.add_task(part, total=total), time.perf_counter()

            def done(name: str, part: str = part, task: TaskID = task) -> None:
                progress.update(task, description=f"{part}: {name}", advance=1)
                write_json(out / "cost.json", record)

            measured[part](done)
            record["wall_seconds"][part] = round(time.perf_counter() - started, 1)
            write_json(out / "cost.json", record)
            progress.remove_task(task)
    if "rows" in record:
        (out / "cost.png").write_bytes(plot(record))
    return record


def measure(words: list[str], console: Console) -> None:
    record = run(Cost.parse(words, "just bench-cost variants=lora,dora models=d512"), console)
    if "rows" in record:
        console.print(table(record))
    console.print("\n".join(prose(record)), markup=False, highlight=False, soft_wrap=True)


def main(words: list[str]) -> None:
    command(words, __doc__, measure, "the rows that were finished, if any, stand in cost.json")
