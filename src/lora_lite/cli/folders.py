"""The commands that need a base model: export, import and merge on folders that transformers reads."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..contract.strict import printable
from ..core import finding
from ..core.detach import detach
from ..core.handle import Attached, AttachedSet
from ..core.load import load as load_file
from ..core.merge import MergeReport, merge
from ..core.save import save
from ..core.writing import new_folder
from ..errors import LoraLiteError, some
from ..peft.export import export_peft
from ..peft.folder import read_folder, refuse_folder
from ..peft.layout import layouts
from ..peft.load import load_peft
from ..peft.plan import applies

WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json", ".gguf", ".h5", ".msgpack")
"""Endings of files that `save_pretrained` writes anew, or that hold weights of another kind."""


def base_model(folder: Path, dtype: str) -> Any:
    """The model in a local folder, as the class that its config names. Raises LoraLiteError where transformers cannot."""
    try:
        import transformers
    except ImportError as error:
        raise LoraLiteError("transformers is not installed.", fix="pip install transformers") from error
    if not (folder / "config.json").is_file():
        raise LoraLiteError(f"{folder} has no config.json.", expected="A model folder.", fix="model.save_pretrained(folder)")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise LoraLiteError(f"--dtype {dtype} is no dtype.", expected="auto, float32, bfloat16 or float16.")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        options: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)  # no code of the folder runs
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        cls = getattr(transformers, (getattr(config, "architectures", None) or ["AutoModel"])[0], None)
        if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
            cls = transformers.AutoModel
        return cls.from_pretrained(folder, dtype=dtype, **options).eval()
    except Exception as error:  # transformers raises what it likes for a damaged folder
        reason = str(error).strip().partition("\n")[0]
        raise LoraLiteError(f"transformers cannot load {folder}: {type(error).__name__}: {reason}.") from error


def attached(arguments: argparse.Namespace) -> tuple[Any, Attached | AttachedSet]:
    """(model, handle) of a checkpoint of ours or a PEFT folder on its base."""
    path = Path(arguments.adapter)
    if not path.exists():
        raise LoraLiteError(f"{path} does not exist.", expected="A checkpoint of ll.save or a PEFT folder.")
    model = base_model(arguments.base, arguments.dtype)
    if path.is_dir():
        return model, load_peft(model, path)
    return model, load_file(model, path, strict_base=not arguments.any_base)


def export(arguments: argparse.Namespace) -> None:
    refuse_folder(Path(arguments.folder))
    model, _ = attached(arguments)
    print(export_peft(model, arguments.folder, rank=arguments.rank, plain=arguments.plain, limit=arguments.limit))


def load(arguments: argparse.Namespace) -> None:
    """A folder that two variants read becomes two files, FILE and FILE with _2 before the ending."""
    file = Path(arguments.file)
    handle = load_peft(base_model(arguments.base, arguments.dtype), arguments.folder, name=arguments.name)
    parts = getattr(handle, "parts", (handle,))
    files = [file, *(file.with_stem(f"{file.stem}_{k}") for k in range(2, len(parts) + 1))]
    if present := [str(f) for f in files if f.exists()]:
        raise LoraLiteError(f"{some(present)} exists.", expected="Nothing is written over.", fix=f"rm {present[0]}")
    for part, place in zip(parts, files):
        save(handle.model, place, name=part.name)
        variant = next(iter(part.layers.values())).variant
        print(f"{place}: {variant} on {len(part.layers)} layers")


def merged(arguments: argparse.Namespace) -> None:
    """The model folder with the adapter folded in, and what else lies in the base's folder, such as the tokenizer."""
    folder = Path(arguments.folder)
    refuse_folder(folder)
    others = beside(arguments.base)
    model, handle = attached(arguments)
    report = fold(model, arguments.limit)
    with new_folder(folder) as place:
        model.save_pretrained(place)
        for file in others:
            if not (place / file.name).exists():
                shutil.copy(file, place)
    print(f"{folder}: {arguments.base} with {len(handle.layers)} layers changed")
    print(report)


def beside(base: Path) -> list[Path]:
    """The files of a model folder that are no weights. Raises LoraLiteError for a link that leads out of it.

    In the cache of the hub a folder of a revision consists of links to the blobs of its model, which are followed.
    """
    inside = base.resolve()
    if inside.parent.name == "snapshots":
        inside = inside.parent.parent
    files = [file for file in base.iterdir() if file.is_file() and not file.name.endswith(WEIGHTS)] if base.is_dir() else []
    if out := [file for file in files if not file.resolve().is_relative_to(inside)]:
        raise LoraLiteError(
            f"{out[0]} is a link to {out[0].resolve()}, out of the model's folder.",
            expected="Files of the folder: what a link shows would be copied into the merged one.",
            fix=f'cp --remove-destination "$(readlink -f {out[0]})" {out[0]}  # if it is meant',
        )
    return files


@torch.no_grad()
def fold(model: nn.Module, limit: float | None = None) -> MergeReport:
    """Merge every adapter for good and take it off. Raises LoraLiteError where a layer would need a bias it does not have, and
    where rounding loses more than `limit` of a change.
    """
    report = merge(model, limit=limit)
    found = {f.path: f.layer for f in finding.adapters(model)}
    new = {path: (layer.weight, layer.bias) for path, layer in found.items()}
    detach(model)
    if grown := [path for path, layer in found.items() if layer.bias is None and new[path][1] is not None]:
        raise LoraLiteError(f"{some(grown)} has no bias, and this adapter moves it.", fix="python -m lora_lite export")
    for path, layer in found.items():
        weight, bias = new[path]
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return report


def say(text: object) -> None:
    """A line without letters that steer a terminal: what stands in a file may be somebody else's."""
    print(printable(str(text)))


def inspect_folder(folder: Path) -> None:
    options, tensors = read_folder(folder)
    here = [v for v, l in layouts().items() if l.peft_type == options["peft_type"].upper() and applies(l, options)]
    say(f"{'peft_type':10} {options['peft_type']}")
    say(f"{'here':10} {', '.join(here) or 'no counterpart'}")
    for option, value in sorted(options.items()):
        if option != "peft_type" and value not in (None, [], {}):
            say(f"  {option:24} {value!r}")
    say(f"{'tensors':10} {len(tensors)}")
    for key, tensor in tensors.items():
        say(f"  {key}  {tuple(tensor.shape)}  {str(tensor.dtype).removeprefix('torch.')}")
