"""lora_lite: a LoRA-family method is one file of mathematics; everything else is given."""

import importlib
from typing import TYPE_CHECKING, Any

from . import algebra
from .algebra import (
    Increment,
    Routing,
    Snapshot,
    apply,
    compose,
    dare,
    format_route,
    frontier,
    parse_route,
    route,
    snapshot,
    ties,
)
from .contract import Adapter, AdapterConfig, Claims, ParamSpec, RanklessConfig, register
from .contract import registry as _registry
from .contract.registry import config, get, names
from .core.attach import attach
from .core.coefficients import disabled, scale, scaled
from .core.detach import detach
from .core.gains import thirds
from .core.handle import Attached
from .core.load import load
from .core.merge import delta_bias, delta_weight, merge, unmerge
from .core.runtime import param_groups, repair
from .core.save import save
from .core.selection import find_targets
from .core.status import Status, status
from .errors import LoraLiteError, LoraLiteWarning
from .version import __version__

if TYPE_CHECKING:
    from . import attention, geometry, objectives, testing
    from .observe.capturing import capture
    from .peft.export import export_peft
    from .peft.load import load_peft

_registry.sources.append(f"{__name__}.variants")

_MODULES = ("annotations", "attention", "geometry", "linalg", "objectives", "spec", "targets", "testing")
_LATER = {"capture": "observe.capturing", "export_peft": "peft.export", "load_peft": "peft.load"}
"""What attaching, training and saving do without is imported when it is first asked for."""

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Attached",
    "Claims",
    "Increment",
    "LoraLiteError",
    "LoraLiteWarning",
    "ParamSpec",
    "RanklessConfig",
    "Routing",
    "Snapshot",
    "Status",
    "__version__",
    "algebra",
    "apply",
    "attach",
    "attention",
    "capture",
    "compose",
    "config",
    "dare",
    "delta_bias",
    "delta_weight",
    "detach",
    "disabled",
    "export_peft",
    "find_targets",
    "format_route",
    "frontier",
    "geometry",
    "get",
    "load",
    "load_peft",
    "merge",
    "names",
    "objectives",
    "param_groups",
    "parse_route",
    "register",
    "repair",
    "route",
    "save",
    "scale",
    "scaled",
    "snapshot",
    "status",
    "testing",
    "thirds",
    "ties",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    """What is imported late, or the config class of a registered variant: `ll.LoRAConfig`."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _LATER:
        globals()[name] = getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
        return globals()[name]
    return _registry.config_class(name)


def __dir__() -> list[str]:
    return [*__all__, *_registry.config_classes()]
