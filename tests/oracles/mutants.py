"""Mutants of real files for every function that reads one: bytes damaged at random, headers with other content by grammar.

`samples` are files and folders of this library and of earlier versions of it; `mutant` changes one of them; `outcome` reads
it and says what came of that. Everything follows from a seed.
"""

import contextlib
import io
import json
import random
import resource
import signal
import struct
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import lora_lite as ll
from lora_lite.cli import main as cli
from lora_lite.core.checkpoint import checksum, seal
from lora_lite.core.reading import METADATA, tensors_of
from lora_lite.testing import toy

FILES = Path(__file__).parents[1] / "core" / "files"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SECONDS, MORE_MEMORY = 1.0, 2**27  # of one reading; the files have at most 100 kB

Parts = dict[str, bytes]


@dataclass(frozen=True)
class Sample:
    """name, content {file name: bytes} (one file is called ""), and the model that it fits."""

    name: str
    parts: Parts
    model: Callable[[], nn.Module] = toy.toy
    variant: str = ""

    def write(self, place: Path) -> Path:
        if "" in self.parts:
            place.write_bytes(self.parts[""])
        else:
            place.mkdir(exist_ok=True)
            for name, content in self.parts.items():
                (place / name).write_bytes(content)
        return place


@dataclass(frozen=True)
class Outcome:
    """kind: accepted, refused, foreign, slow or wrong; told: the error, of foreign ones with the place that raised it."""

    kind: str
    told: str
    seconds: float


# --- what real files look like ---------------------------------------------------------------------------------------------

OF_FILES: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "alpha": 8.0, "targets": ("q_proj", "down_proj"), "rank_pattern": {"down_proj": 2}},
    "vera": {"r": 4, "save_shared": False, "targets": ("o_proj",)},
    "randlora": {"r": 4, "targets": ("q_proj",)},
    "lokr": {"r": 2, "targets": ("up_proj",)},
    "boft": {"targets": ("up_proj",)},
    "road": {"targets": ("q_proj",)},
    "dora": {"r": 2, "alpha": 4.0, "targets": ("q_proj",)},
    "antipasto_rot": {"r": 8, "targets": ("o_proj",), "roles": None},
}
OLD = ("version3", "ranks", "drawn", "tie", "scales", "width", "older_options", "outputs")
OF_FOLDERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "alpha": 8.0, "targets": ("q_proj", "down_proj"), "rank_pattern": {"down_proj": 2}},
    "dora": {"r": 2, "alpha": 4.0, "targets": ("q_proj",)},
    "loha": {"r": 2, "targets": ("q_proj",)},
    "lokr": {"r": 2, "targets": ("up_proj",)},
    "oft": {"block_size": 4, "targets": ("q_proj",)},
    "vera": {"r": 4, "targets": ("o_proj", "down_proj")},
    "ia3": {"targets": ("q_proj",)},
    "hra": {"r": 4, "targets": ("q_proj",)},
    "road": {"targets": ("q_proj",)},
    "delora": {"r": 2, "targets": ("q_proj",), "start": "zero_b"},
}


def small_one() -> nn.Module:
    return toy.one(8, 8)


def samples(place: Path) -> list[Sample]:
    """Files of ours, of earlier versions, PEFT folders, and configs as JSON."""
    made = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for variant, options in OF_FILES.items():
            model = toy.toy()
            toy.perturb(ll.attach(model, ll.config(variant, **options)))
            if variant == "dora":
                toy.perturb(ll.attach(model, ll.config("hra", r=2, targets=("down_proj",)), name="second"))
            ll.save(model, place / variant)
            made.append(Sample(f"file {variant}", {"": (place / variant).read_bytes()}))
        for space in ("delta", "output"):
            model = toy.toy()
            for seed, variant in enumerate(("lora", "ia3")):
                toy.perturb(ll.attach(model, ll.config(variant, targets=("q_proj",)), name=variant), seed=seed)
            taken = {ll.snapshot(model, variant): weight for variant, weight in (("lora", 0.5), ("ia3", 2.0))}
            ll.detach(model)
            ll.apply(model, ll.compose(taken, space=space), name="composed")
            ll.save(model, place / space)
            made.append(Sample(f"file {space}", {"": (place / space).read_bytes()}))
        for name in OLD:
            content = (FILES / f"{name}.safetensors").read_bytes()
            made.append(Sample(f"old {name}", {"": content}, small_one if name.startswith("version") else toy.toy))
        for variant, options in OF_FOLDERS.items():
            model = toy.toy()
            toy.perturb(ll.attach(model, ll.config(variant, **options)))
            ll.export_peft(model, folder := place / f"peft_{variant}")
            made.append(Sample(f"folder {variant}", {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)}))
        for variant in ll.names():
            made.append(Sample(f"json {variant}", {"": ll.get(variant).Config().to_json().encode()}, variant=variant))
    return made


# --- mutation --------------------------------------------------------------------------------------------------------------

NUMBERS = (0, -1, 1, 2, 3, 7, 2**16, 2**16 + 1, 2**31, 2**53, 2**63, 2**64, 10**400, -(10**30), 0.5, 1e30, 1e308, -1e-300)
CONSTANTS = (float("nan"), float("inf"), -float("inf"))
TEXTS = (
    *("", " ", "x", "lora", "dora", "vera", "full", "default", "q_proj", "blocks.0.q_proj", "*", "..", "[", "../../etc/passwd"),
    *("(.+.+)+!", "(|)" * 60 + "!", "re:(.+.+)+!", "re:[", "(" * 500, "a|" * 400 + "a", ".*.*.*.*.*!", "((a*)*)*b"),
    *("a" * 5000, "\x1b[2J\x07", "\u202e", "\ud800", "a\x00b", "nan", "1e999", "nan_nan_", "__class__", "nn", "Tensor"),
    *("float32", "int8", "bool", "complex64", "float8_e4m3fn", "F32", "F16", "I8", "F8_E4M3", "C64"),
    *("gaussian", "all-linear", "ALL-LINEAR", "none", "asvd", "corda", "peft", "lycoris"),
)
WORDS = (
    "r",
    "alpha",
    "dtype",
    "shape",
    "data_offsets",
    "__metadata__",
    "rank",
    "options",
    "seed",
    "step",
    "id",
    "bias",
    "layers",
)


class Raw:
    """A number or a structure that json.dumps would not write: the text itself."""

    def __init__(self, text: str):
        self.text = text


RAW = (
    "1e999",
    "-1e999",
    "NaN",
    "1" * 5000,
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    '{"a": 1, "a": 2}',
    "",
    "0x1",
    "tru",
)


def value(rng: random.Random, old: Any) -> Any:
    kind = rng.randrange(10)
    if kind < 2 and isinstance(old, (int, float)) and not isinstance(old, bool) and abs(old) < 1e300:
        return rng.choice((old + 1, old - 1, -old, old * 2, old / 2, old * 2**20, str(old), [old], old + 0.5, float(old)))
    if kind < 5:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(CONSTANTS)
    if kind < 8:
        return rng.choice(TEXTS)
    if kind < 9:
        return Raw(rng.choice(RAW))
    return rng.choice(
        (None, True, False, [], {}, [None], [[]], {"": None}, [0] * 40, [2**31, 2**31], {"a": {"b": []}}, [1, -1])
    )


def place_in(found: Any, rng: random.Random) -> tuple[Any, ...]:
    """A place in a JSON value, found by going down at random; texts that hold a table are gone into."""
    inner = opened(found)
    if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.05:
        return ()
    key = rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
    return (key, *place_in(inner[key], rng))


def opened(found: Any) -> Any:
    if isinstance(found, str) and found[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(found)
    return found


def changed(found: Any, path: tuple[Any, ...], rng: random.Random) -> Any:
    """The value with another one, none, or one more at `path`."""
    if not path:
        return value(rng, found)
    inner, nested = opened(found), isinstance(found, str)
    key, rest = path[0], path[1:]
    if not rest and isinstance(inner, dict) and (what := rng.randrange(8)) < 3:
        if what == 0:
            del inner[key]
        elif what == 1:
            inner[rng.choice((*TEXTS, *WORDS))] = inner.pop(key)
        else:
            inner[rng.choice((*TEXTS, *WORDS))] = rng.choice((inner[key], value(rng, inner[key])))
    else:
        inner[key] = changed(inner[key], rest, rng)
    return written(inner) if nested else inner


def written(found: Any) -> str:
    """JSON of a value that may hold Raw."""
    raws: list[str] = []

    def mark(one: Any) -> Any:
        raws.append(one.text)
        return f"<raw {len(raws) - 1}>"

    text = json.dumps(found, default=mark)
    for n, raw in enumerate(raws):
        text = text.replace(f'"<raw {n}>"', raw)
    return text


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: str, data: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def mutated_json(text: str, rng: random.Random, below: str | None = None) -> str:
    """JSON with one to three changes; below: the entry in which to make them."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            break
        if isinstance(found, dict) and below in found:
            path = (below, *place_in(found[below], rng))
        else:
            path = place_in(found, rng)
        text = written(changed(found, path, rng))
    return text


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    found, kind = bytearray(content), rng.randrange(8)
    at = rng.randrange(len(found)) if rng.random() < 0.6 else rng.randrange(min(len(found), 4000))
    if kind < 3:
        found[at] ^= 1 << rng.randrange(8)
    elif kind == 3:
        found[at] = rng.randrange(256)
    elif kind == 4:
        del found[at:]
    elif kind == 5:
        del found[at : at + rng.randrange(1, 64)]
    elif kind == 6:
        found[at:at] = rng.randbytes(rng.randrange(1, 64))
    else:
        found[:8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(found), len(found) - 8, 100_000_001)))
    return bytes(found)


def mutated_header(content: bytes, rng: random.Random) -> bytes:
    """Another value somewhere in the header, or, more often, in what it says of the adapter; the checksums are made anew."""
    found, data = split(content)
    text = mutated_json(json.dumps(found), rng, METADATA if rng.random() < 0.75 else None)
    new = joined(text, data)
    if rng.random() < 0.8:
        with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return resealed(new)
    return new


def mutant(sample: Sample, rng: random.Random) -> tuple[Sample, bool]:
    """(the changed sample, whether it is damage, which nobody may take for the original)."""
    which = rng.choice(sorted(sample.parts)) if rng.random() < 0.6 else sorted(sample.parts)[0]
    content, damage = sample.parts[which], rng.random() < 0.3
    if damage:
        new = mutated_bytes(content, rng)
    elif sample.variant or which == CONFIG:
        new = mutated_json(content.decode(), rng).encode("utf-8", "surrogatepass")
    else:
        new = mutated_header(content, rng)
    told = damage and sample.name.startswith(("file", "folder")) and which != CONFIG  # by a checksum
    return Sample(sample.name, sample.parts | {which: new}, sample.model, sample.variant), told


# --- reading ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limited(seconds: float = 5.0, more: int = MORE_MEMORY) -> Iterator[None]:
    """Within an address space that is `more` bytes above what the process has, and with an end to what never returns."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    alone = threading.current_thread() is threading.main_thread()

    def stop(*_: Any) -> None:
        raise TimeoutError(f"{seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop) if alone else None
    resource.setrlimit(resource.RLIMIT_AS, (held + more, hard))
    try:
        if alone:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        if alone:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@dataclass
class Reader:
    """Reads samples; models are made once, since a reading that succeeds is taken back and one that fails changes nothing."""

    place: Path
    models: dict[Any, nn.Module] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def read(self, sample: Sample) -> torch.Tensor | None:
        if sample.variant:
            ll.get(sample.variant).Config.from_json(sample.parts[""].decode("utf-8", "replace"))
            return None
        model = self.models.setdefault(sample.model, sample.model())
        path = sample.write(self.place / ("folder" if CONFIG in sample.parts else "file"))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            with contextlib.suppress(ll.LoraLiteError):
                cli.inspect(SimpleNamespace(file=path))  # type: ignore[arg-type]
            if strange := {c for c in said.getvalue() if not (c.isprintable() or c == "\n")}:
                raise AssertionError(f"inspect prints {strange!r}")
        handle = (ll.load_peft if path.is_dir() else ll.load)(model, path)
        try:
            x = toy.inputs(2, 3, 8 if sample.model is small_one else 24)
            with torch.no_grad():
                return model(x)
        finally:
            handle.detach()

    def outcome(self, sample: Sample, damage: bool = False) -> Outcome:
        started = time.process_time()
        try:
            with warnings.catch_warnings(), limited():
                warnings.simplefilter("ignore")
                y = self.read(sample)
            kind, told = "accepted", ""
            if damage and y is not None and not torch.equal(y, self.outputs[sample.name]):
                kind, told = "wrong", "other outputs than those of the file before it was damaged"
        except ll.LoraLiteError as error:
            kind, told = "refused", str(error)
        except Exception as error:
            (*_, frame) = traceback.extract_tb(error.__traceback__)
            kind, told = (
                "foreign",
                f"{type(error).__name__}: {str(error)[:200]} at {frame.filename}:{frame.lineno} {frame.name}",
            )
        seconds = time.process_time() - started
        return Outcome("slow", f"{kind} {told}", seconds) if seconds > SECONDS else Outcome(kind, told, seconds)


def resealed(content: bytes) -> bytes:
    """The file with the checksums of what it holds, as somebody would write it who wants it read."""
    found, data = split(content)
    told = found[METADATA]
    if "checksum" in told:
        told["checksum"] = checksum(tensors_of(bytearray(content))[1])
        told["seal"] = seal(told)
    return joined(json.dumps(found), data)


def run(
    count: int, seed: int, place: Path, kept: Callable[[Sample, Outcome], None] = lambda sample, outcome: None
) -> dict[str, Any]:
    """Read `count` mutants; {kind: how many}, the slowest, and the errors that are not LoraLiteError by their text."""
    rng, found = random.Random(seed), samples(place)
    reader = Reader(place)
    for sample in found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if (y := reader.read(sample)) is not None:
                reader.outputs[sample.name] = y
    counts: dict[str, int] = dict.fromkeys(("accepted", "refused", "foreign", "slow", "wrong"), 0)
    slowest, bad = 0.0, {}
    for _ in range(count):
        sample, damage = mutant(rng.choice(found), rng)
        outcome = reader.outcome(sample, damage)
        counts[outcome.kind] += 1
        slowest = max(slowest, outcome.seconds)
        if outcome.kind not in ("accepted", "refused"):
            bad.setdefault(f"{sample.name.split()[0]} {outcome.kind}: {outcome.told}", []).append(sample)
            kept(sample, outcome)
    return {"mutants": count, **counts, "slowest": round(slowest, 3), "bad": {told: len(those) for told, those in bad.items()}}
