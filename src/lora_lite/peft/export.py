"""export_peft: adapters as a folder that PEFT, and for plain LoRA vLLM and llama.cpp too, load.

A method that PEFT has is written in PEFT's own form (see layout.py). Everything else is written as plain LoRA, from the
adapted layer's own matrix: W' - W = B A with scale 1, exact where the variant's rank has a bound.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..core import finding
from ..core.untouched import warn_left_out
from ..errors import LoraLiteError, some
from ..sites.layer import is_conv1d
from ..sites.model import unwrapped
from ..sites.obstacles import expert_parameters
from .folder import refuse_folder, write_folder
from .layout import exactly
from .native import as_native, native_obstacle
from .plain import EXACT, ByLayer, as_plain_lora


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
    refuse_moved(model, found)
    refuse_kernels(model, found)
    warn_left_out(model, found[0].adapter.group.base, f"{folder}")
    obstacle = "plain LoRA was asked for" if plain or rank is not None else native_obstacle(found)
    by_layer: ByLayer = {}
    for f in found:
        by_layer.setdefault(f.path, []).append(f)
    if obstacle:
        options, tensors, errors, notes = as_plain_lora(by_layer, rank, limit, obstacle)
    else:
        (options, tensors), errors, notes = as_native(found), {}, ()
    notes = (*notes, *passed_by(model, found))
    write_folder(folder, finished(model, by_layer, options), tensors)
    return Exported(folder, options["peft_type"], options["r"] if obstacle else None, errors, notes)


MOVED = ("gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3")
"""Names of targets that PEFT takes for those of a model's experts, as transformers 4 had them, where experts are parameters."""


def refuse_moved(model: nn.Module, found: list[finding.Found]) -> None:
    """Raise where PEFT would put the adapter of a layer on the experts beside it and compute something else."""
    moved = [f.path for f in found if f.path.rpartition(".")[2] in MOVED]
    if moved and expert_parameters(model):
        raise LoraLiteError(
            f"PEFT takes {some(dict.fromkeys(path.rpartition('.')[2] for path in moved))} for names of this model's experts.",
            expected="It would adapt those in the place of " + some(moved) + ", and compute something else.",
            fix="ll.save(model, path)  # a file of this library; for PEFT: attach with "
            f"exclude={tuple(dict.fromkeys(path.rpartition('.')[2] for path in moved))!r}",
        )


KERNELS = {"model_type": ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), "layers": ("out_proj", "conv1d")}
"""Where PEFT takes no adapter, since kernels read the weight: `_check_lora_target_modules_mamba` of PEFT 0.21."""


def refuse_kernels(model: nn.Module, found: list[finding.Found]) -> None:
    """Raise for layers that PEFT refuses at load."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    names = dict.fromkeys(name for f in found if (name := f.path.rpartition(".")[2]) in KERNELS["layers"])
    if names and kind in KERNELS["model_type"]:
        raise LoraLiteError(
            f"PEFT refuses adapters on {some(names)} of {kind} models, whose kernels read the weight without a call.",
            fix=f"ll.save(model, path)  # a file of this library; for PEFT: attach with exclude={tuple(names)!r}",
        )


def passed_by(model: nn.Module, found: list[finding.Found]) -> tuple[str, ...]:
    """A note where torch's encoder layers take a short cut past PEFT's modules, which carry no hooks."""
    owners = [model.get_submodule(f.path.rpartition(".")[0]) for f in found]
    if not any(isinstance(owner, nn.TransformerEncoderLayer) for owner in owners):
        return ()
    return (
        "In eval mode nn.TransformerEncoderLayer passes PEFT's adapters by: torch.backends.mha.set_fastpath_enabled(False)",
    )


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
