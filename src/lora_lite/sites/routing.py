"""Which layers stand behind a router: experts in a list see rows that were chosen, not the batch as it came."""

from torch import nn


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
