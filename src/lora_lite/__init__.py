"""lora_lite: a LoRA-family method is one file of mathematics; everything else is given."""

import importlib
from typing import TYPE_CHECKING, Any

from . import registry
from .adapter import Adapter, Claims
from .algebra.compose import compose
from .algebra.groups import thirds
from .algebra.router import Routing, frontier, route
from .algebra.routes import format_route, parse_route
from .algebra.snapshot import Increment, Snapshot, apply, snapshot
from .algebra.ties import dare, ties
from .attach import Attached, attach, detach
from .config import AdapterConfig, RanklessConfig
from .errors import LoraLiteError, LoraLiteWarning
from .io import load, save
from .merge import delta_bias, delta_weight, merge, unmerge
from .registry import config, get, names, register
from .runtime import Status, disabled, param_groups, repair, scale, status
from .spec import ParamSpec
from .targets import find_targets
from .version import __version__

if TYPE_CHECKING:
    from . import attention, geometry, objectives
    from .capturing import capture
    from .peft.export import export_peft
    from .peft.load import load_peft

MODULES = ("attention", "geometry", "objectives")
LATER = {"capture": "capturing", "export_peft": "peft.export", "load_peft": "peft.load"}
"""What attaching, training and saving do without is imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    """What is imported late, or the config class of a registered variant: `ll.LoRAConfig`."""
    if name in MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in LATER:
        globals()[name] = getattr(importlib.import_module(f"{__name__}.{LATER[name]}"), name)
        return globals()[name]
    return registry.config_class(name)


def __dir__() -> list[str]:
    return [*dict.fromkeys([*globals(), *MODULES, *LATER]), *registry.config_classes()]
