"""What of a model can be adapted at all, and what "all-linear" leaves out though it could be: {path: reason}."""

from collections.abc import Iterable, Mapping

from torch import nn

from ..errors import LoraLiteError, some
from ..sites import obstacles
from ..sites.layer import Layer, sizes, unfit
from ..sites.measuring import odd_forward
from ..sites.model import base_model, embeddings, linears, output_embeddings, unwrapped
from .repairs import TIED, reasons, renaming


def impossible(model: nn.Module) -> dict[str, str]:
    """{path: why it cannot be adapted}: Linear-like layers, layers of unknown kind, and parameters that are no layers."""
    found = {path: f"read, not called: {reader} uses its weight" for path, reader in obstacles.read(model)[0].items()}
    found |= {
        path: TIED + others[0] for path, others in obstacles.tied(model).items() if not set(others) <= linears(model).keys()
    }
    found |= {path: why for path, layer in linears(model).items() if (why := unfit(layer))}
    for path, layer in linears(model).items():
        if path in found or layer.weight.is_meta:
            continue
        if odd := odd_forward(layer):
            found[path] = f"forward: {odd}"
        elif min(sizes(layer)) < 2:
            found[path] = f"narrow: {sizes(layer)[0]} -> {sizes(layer)[1]}"
    for path in found.keys() & {p for p, layer in linears(model).items() if id(layer) in output_embeddings(model)}:
        found[path] = f"output embedding, {found[path]}"
    found |= {path: "TorchScript, which runs no hooks that come later" for path in obstacles.scripted(model)}
    found |= {path: f"unknown kind: {type(m).__name__}" for path, m in obstacles.unknown_layers(model).items()}
    found |= {
        path: f"experts: a parameter of shape {tuple(parameter.shape)}, no Linear"
        for path, parameter in obstacles.expert_parameters(model).items()
    }
    return found | {path: "attention: a parameter that is read" for path in obstacles.attention_parameters(model)}


def unwanted(model: nn.Module, present: Mapping[str, Layer]) -> dict[str, str]:
    """{path: reason} of layers that can be adapted and that "all-linear" leaves out."""
    inside = {id(module) for module in base_model(model).modules()}
    heads, rows = output_embeddings(model), embeddings(model)
    found = read_at_times(model)
    for path, experts in obstacles.routers(model).items():
        found[path] = f"router: its output chooses among {experts}"
    for path, layer in present.items():
        if id(layer) in heads or id(layer.weight) in rows:
            found[path] = "output embedding"
        elif id(layer) not in inside:
            found[path] = f"head: outside {type(base_model(model)).__name__}"
    return found


def read_at_times(model: nn.Module) -> dict[str, str]:
    """{path: reason} of layers that an adapter reaches where they are called and not where their weight is read."""
    return obstacles.read(model)[1]


def refuse_absent(model: nn.Module, path: object, moved: Mapping[str, str]) -> None:
    """Raise where layers of a file, {path there: path here}, are absent, with the renaming under which all are there."""
    present = linears(unwrapped(model))
    if missing := [here for here in moved.values() if here not in present]:
        paths = renaming(list(moved), list(present))
        raise LoraLiteError(
            f"{path} belongs to another model: it has no Linear {some(missing)}.",
            found=f"Linears here: {some(present)}.",
            fix=f"ll.load(model, path, paths={paths})" if paths else "ll.load(model, path)  # model: as it was saved from",
        )


def refuse_places(model: nn.Module, path: object, paths: Iterable[str]) -> None:
    """Raise where adapters of a file would stand on layers that cannot carry them: tied, read, of another rule."""
    model, paths = unwrapped(model), set(paths)
    offenders = {p: why for p, why in impossible(model).items() if p in paths and not why.startswith("narrow")}
    offenders |= {
        p: TIED + next(o for o in others if o not in paths)
        for p, others in obstacles.tied(model).items()
        if p in paths - offenders.keys() and not set(others) <= paths
    }
    if offenders:
        raise LoraLiteError(
            f"{path} has adapters on {reasons(offenders)} Such layers of this model cannot be adapted.",
            expected="The model that it was trained on: each of its layers called as W x + b, its weight with one use.",
            fix=f"print(type(model.get_submodule({next(iter(offenders))!r})))  # and build the model of the training",
        )
