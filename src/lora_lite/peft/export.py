"""export_peft: adapters as a folder that PEFT, and for plain LoRA vLLM and llama.cpp too, load.

A method that PEFT has is written in PEFT's own form (see layout.py). Everything else is written as plain LoRA, from the
adapted layer's own matrix: W' - W = B A with scale 1, exact where the variant's rank has a bound.
"""

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..contract.adapter import Adapter
from ..core import finding
from ..core.checkpoint import serialized, write_atomically
from ..core.merge import effective, refuse_unmergeable
from ..errors import LoraLiteError, some
from ..mathematics.maps import is_finite
from ..sites.layer import is_conv1d
from ..sites.model import unwrapped
from .layout import Layout, exactly, layouts

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model."
EXACT = 1e-6  # relative error of an export that counts as exact: rounding to float32 and no more

ByLayer = dict[str, list[finding.Found]]


@dataclass(frozen=True)
class Exported:
    """What `export_peft` wrote.

    folder     where                              peft_type  of adapter_config.json
    rank       of plain LoRA in every layer, None in a form of PEFT's own
    errors     {layer: |W' - W - B A| / |W' - W|, Frobenius} of plain LoRA; 0 is never cut
    notes      what a reader of the folder should know
    """

    folder: Path
    peft_type: str
    rank: int | None
    errors: dict[str, float]
    notes: tuple[str, ...]

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        form = f"PEFT's own {self.peft_type}" if self.rank is None else f"plain LoRA of rank {self.rank}, scale 1"
        cut = [f"  {path}  {error:.2e}" for path, error in self.errors.items() if error > EXACT]
        head = f"{self.folder}: {form}" + ("; share of the change that is cut off:" if cut else ", exact")
        return "\n".join([head, *cut, *(f"  {note}" for note in self.notes)])


def export_peft(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    rank: int | None = None,
    plain: bool = False,
    limit: float = 0.1,
) -> Exported:
    """Write adapter `name`, or all of them as one (None), to a folder that `PeftModel.from_pretrained(model, folder)` loads.

    rank   None: PEFT's own form of the method where there is one and every coefficient is 1, else plain LoRA of the rank
           that holds the change exactly. A number: plain LoRA of that rank
    plain  plain LoRA also where PEFT has the method: what vLLM and llama.cpp read
    limit  largest share |W' - W - B A| / |W' - W| of a layer's change that a chosen rank may cut off

    Coefficients are folded into plain LoRA. Raises LoraLiteError, with nothing written: a folder with content, a merged
    adapter, a coefficient per sample, a method that is not a linear map, a change without a bound on its rank where no rank
    is given, a cut above `limit`.
    """
    model, folder = unwrapped(model), Path(folder)
    refuse_folder(folder)
    found = finding.present(model, name)
    finding.refuse_other_root(found)
    finding.refuse_merged(finding.adapters(model))
    finding.refuse_lost(found)
    finding.refuse_sharded(found)
    if any(not f.path for f in found):
        raise LoraLiteError(
            "The model itself is the adapted layer.",
            expected="PEFT names a layer by its path in a model.",
            fix="ll.attach(torch.nn.Sequential(layer), cfg)",
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise LoraLiteError(f"rank={rank!r} is no rank.", expected="An integer of at least 1, or None.", fix="rank=16")
    obstacle = "plain LoRA was asked for" if plain or rank is not None else native_obstacle(found)
    by_layer: ByLayer = {}
    for f in found:
        by_layer.setdefault(f.path, []).append(f)
    if obstacle:
        options, tensors, errors, notes = as_plain_lora(by_layer, rank, limit, obstacle)
    else:
        (options, tensors), errors, notes = as_native(found), {}, ()
    write_folder(folder, finished(model, by_layer, options), tensors)
    return Exported(folder, options["peft_type"], options["r"] if obstacle else None, errors, notes)


# --- PEFT's own form --------------------------------------------------------------------------------------------------------


def native_obstacle(found: list[finding.Found]) -> str:
    """Why PEFT has no form of its own for these adapters; '' where it has one."""
    known = layouts()
    for f in found:
        layout, variant = known.get(f.adapter.variant), f.adapter.variant
        if layout is None:
            return f"no form of PEFT's own is known for {variant}"
        if isinstance(f.adapter.coeff, Tensor) or f.adapter.coeff != 1.0:
            return "the coefficient is not 1, and PEFT's own forms have none"
        for option, value in layout.only.items():
            if getattr(f.adapter.cfg, option) != value:
                return f"PEFT's {variant} is {option}={value!r}, here {option}={getattr(f.adapter.cfg, option)!r}"
        if missing := [k for k, _ in f.adapter.named_parameters() if k not in layout.tensors]:
            return f"PEFT's {variant} has no {some(missing)}"
        if is_conv1d(f.layer) and not layout.conv1d:
            return f"PEFT has {variant} for nn.Linear alone, {f.path} is Conv1D"
    if len({known[f.adapter.variant].peft_type for f in found}) > 1 or len({f.path for f in found}) < len(found):
        return "several adapters are exported as one"
    try:
        options, _ = as_native(found)
    except LoraLiteError as error:
        return str(error).partition("\n")[0]
    if odd := [f.path for f in found if not known[f.adapter.variant].covers(options, f.path)]:
        return f"PEFT would take the names of other layers for {some(odd)}"
    return ""


def as_native(found: list[finding.Found]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(options, tensors) in PEFT's own form. Raises LoraLiteError where layers need options that PEFT has once."""
    known, each, tensors = layouts(), {}, {}
    for f in found:
        layout, a = known[f.adapter.variant], f.adapter
        each[f.path] = native_options(layout, a)
        for name, key in layout.tensors.items():
            if name in a.specs():
                tensors[f"{PREFIX}model.{f.path}.{key.name}"] = key.write(getattr(a, name))
        for name, key in layout.shared.items():
            tensors[f"{PREFIX}{key.name}"] = key.write(a.shared[name].tensor)
    layout, first = known[found[0].adapter.variant], found[0].adapter.group.cfg
    options: dict[str, Any] = {"peft_type": layout.peft_type}
    for option in next(iter(each.values())):
        values = {path: row[option] for path, row in each.items()}
        if isinstance(values[found[0].path], list):
            options[option] = [item for value in values.values() for item in value]
            continue
        ranked = option == layout.options.get("r")
        common = first.r if ranked else next(iter(values.values()))
        options[option] = common
        others = {f"^{re.escape(path)}$": value for path, value in values.items() if value != common}
        if others and not (layout.patterns and option in (layout.options.get("r"), layout.options.get("alpha"))):
            raise LoraLiteError(f"layers differ in {option} ({some(sorted({str(v) for v in values.values()}))}), PEFT has one")
        if others:
            options["rank_pattern" if ranked else "alpha_pattern"] = others
    return options, tensors


def native_options(layout: Layout, a: Adapter) -> dict[str, Any]:
    """PEFT's options for one layer; alpha is what gives PEFT our scale."""
    values = {theirs: getattr(a.cfg, ours) for ours, theirs in layout.options.items()}
    if "alpha" in layout.options:
        root = "rslora" in layout.options and a.cfg.rslora
        alpha = a.s * (a.cfg.r**0.5 if root else a.cfg.r)
        values[layout.options["alpha"]] = round(alpha) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha
    return {**values, **layout.when, **layout.derived(a)}


# --- plain LoRA -------------------------------------------------------------------------------------------------------------


def as_plain_lora(
    by_layer: ByLayer, rank: int | None, limit: float, obstacle: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float], tuple[str, ...]]:
    """(options, tensors, errors, notes) with one rank for all layers, since vLLM reads no rank_pattern; zeros fill up."""
    found = [f for group in by_layer.values() for f in group]
    refuse_unmergeable(found)
    bounds = {path: bound(group) for path, group in by_layer.items()}
    unbounded = [path for path, most in bounds.items() if most is None]
    if rank is None and unbounded:
        raise LoraLiteError(
            f"{found[0].adapter.variant} cannot be exported exactly: {obstacle}, and the rank of its change has no bound.",
            expected=f"A rank to cut {some(unbounded)} to.",
            fix="ll.export_peft(model, folder, rank=16)  # what is cut off is stated per layer",
        )
    r = rank or max(most for most in bounds.values() if most)
    pieces: dict[str, tuple[Tensor, Tensor]] = {}
    errors, needs, biases, sizes = {}, {}, {}, {}
    allowed = EXACT if rank is None else max(limit, EXACT)
    for path, group in by_layer.items():
        adapted, bias, W = effective(group[0].layer, [f.adapter for f in group])
        old = group[0].layer.bias
        floor = float(torch.finfo(torch.float32).eps * W.norm())  # a change below it is rounding
        pieces[path], errors[path], needs[path] = factored(adapted - W, r, floor, allowed)
        biases[path] = bias if old is None else bias - old.detach().double()
        sizes[path] = 1 + float(W.norm())
    if above := {path: error for path, error in errors.items() if not error <= allowed}:
        path, worst = max(above.items(), key=lambda item: item[1])
        raise LoraLiteError(
            f"rank={r} cuts off {worst:.2g} of the change of {path}, and more than limit={allowed:g} in {len(above)} layers.",
            expected=f"Every layer is within the limit from rank {max(needs.values())} on.",
            fix=f"ll.export_peft(model, folder, rank={max(needs.values())})  # or limit={math.ceil(20 * worst) / 20}",
        )
    moved = [path for path, b in biases.items() if float(b.abs().max()) > 1e-12 * sizes[path]]
    tensors: dict[str, Tensor] = {}
    for path, (A, B) in pieces.items():
        tensors[f"{PREFIX}model.{path}.lora_A.weight"] = A
        tensors[f"{PREFIX}model.{path}.lora_B.weight"] = B
        if moved:
            tensors[f"{PREFIX}model.{path}.lora_B.bias"] = biases[path]
    options = {"peft_type": "LORA", "r": r, "lora_alpha": r, "use_rslora": False, "use_dora": False, "lora_dropout": 0.0}
    options |= {"bias": "none", "lora_bias": bool(moved), "init_lora_weights": True}
    notes = [f"{some(moved)}: the bias moves too, which PEFT loads and vLLM and llama.cpp refuse (lora_bias)"] if moved else []
    if coefficients := sorted({f.adapter.coeff for f in found} - {1.0}):
        notes.append(f"the coefficient {some(map(str, coefficients))} is part of the numbers")
    return options, tensors, errors, tuple(notes)


def bound(group: list[finding.Found]) -> int | None:
    """Largest rank of what these adapters of one layer change together, None where one of them has no bound."""
    ranks = [f.adapter.claims.rank(f.adapter.cfg) if f.adapter.claims.rank else None for f in group]
    return None if None in ranks else min(sum(ranks), group[0].adapter.d_in, group[0].adapter.d_out)  # type: ignore[arg-type]


def factored(D: Tensor, r: int, floor: float, limit: float) -> tuple[tuple[Tensor, Tensor], float, int]:
    """((A (r, i), B (o, r)) in float32 with B A = D as well as rank r allows, |D - B A| / max(|D|, floor), rank for `limit`).

    A random projection finds the column space where the rank of D is at most r; what it leaves over is measured, and only
    where there is something the full decomposition follows, which cuts best.
    """
    o, i = D.shape
    k = min(r, o, i)
    scale = max(float(D.norm()), floor)
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(D @ torch.randn(i, min(k + 8, i), generator=generator, dtype=D.dtype).to(D.device)).Q
    inside = float((D - Q @ (Q.T @ D)).norm()) <= 1e-9 * scale
    U, S, Vh = torch.linalg.svd(Q.T @ D if inside else D, full_matrices=False)
    U = Q @ U if inside else U
    root = S[:k].sqrt()
    A, B = D.new_zeros(r, i).float(), D.new_zeros(o, r).float()
    A[:k], B[:, :k] = root[:, None] * Vh[:k], U[:, :k] * root
    left = S.square().flip(0).cumsum(0).flip(0).sqrt()  # left[k]: what rank k leaves over
    needed = max(1, int((left > limit * scale).sum()))
    return (A, B), float((D - B.double() @ A.double()).norm()) / scale if scale else 0.0, needed


# --- the folder -------------------------------------------------------------------------------------------------------------


def finished(model: nn.Module, by_layer: ByLayer, options: dict[str, Any]) -> dict[str, Any]:
    """The whole adapter_config.json."""
    paths = list(by_layer)
    targets = exactly(paths, [path for path, _ in model.named_modules() if path not in by_layer])
    base = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return {
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": targets,
        "task_type": None,
        **({"fan_in_fan_out": True} if all(is_conv1d(group[0].layer) for group in by_layer.values()) else {}),
        **options,
    }


def refuse_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LoraLiteError(f"{folder} exists.", expected="Nothing is written over.", fix=f'shutil.rmtree("{folder}")')
    if not folder.absolute().parent.is_dir():
        raise LoraLiteError(
            f"{folder}: the folder around it does not exist.", fix=f'Path("{folder.parent}").mkdir(parents=True)'
        )


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its name where the block succeeds and is removed where it fails."""
    refuse_folder(folder)
    temporary = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_folder(folder: Path, options: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    content = {
        k: (t.detach().float() if t.dtype == torch.float64 else t.detach()).cpu().contiguous() for k, t in tensors.items()
    }
    if bad := [key for key, tensor in content.items() if not is_finite(tensor)]:
        raise LoraLiteError(f"{some(bad)} is not finite.", expected="Finite numbers.", fix="ll.status(model)")
    with new_folder(folder) as place:
        write_atomically(place / TENSORS, serialized(content, {"format": "pt"}))
        write_atomically(place / CONFIG, (json.dumps(options, indent=2, sort_keys=True) + "\n").encode())
