"""What a model's structure says of the rows that its layers see: chosen by a router, or the batch with time behind it."""

from torch import nn

TIME_FIRST = frozenset(
    "bridgetower bros clipseg convbert dab-detr edgetam_video efficientloftr fsmt mask2former mlcd mlcd_vision_model oneformer "
    "perception_lm prophetnet recurrent_gemma xlm-prophetnet xlnet".split()
)
"""Model types of transformers whose source turns (batch, time) over somewhere inside."""


def batch_first(model: nn.Module) -> bool:
    """Whether the layers of the model are known to see (batch, time, ...): its attention or recurrent modules say so, or it is
    one of transformers, apart from those that turn their activations over inside.
    """
    said = {one for module in model.modules() if isinstance(one := getattr(module, "batch_first", None), bool)}
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return False not in said and (True in said or (isinstance(kind, str) and kind not in TIME_FIRST))


def chooses(module: nn.Module, count: int, outside: nn.Module) -> bool:
    """Whether a matrix with `count` outputs stands in the module, apart from what is inside `outside`."""
    within = {id(parameter) for parameter in outside.parameters()}
    return any(
        p.ndim == 2 and count in p.shape and id(p) not in within and name.rpartition(".")[2] != "bias"
        for name, p in module.named_parameters()
    )


def routed(model: nn.Module) -> list[str]:
    """Paths of the lists and dicts of modules that stand beside a matrix with one output for each of them: a router."""
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and path
    }
    return [
        path
        for path, module in lists.items()
        if len(module) > 1 and chooses(model.get_submodule(path.rpartition(".")[0]), len(module), module)
    ]
