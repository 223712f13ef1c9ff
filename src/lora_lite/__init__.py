"""lora_lite: a LoRA-family method is one file of mathematics; everything else is given."""

from . import attention, geometry, objectives, registry
from .adapter import Adapter, Claims
from .algebra.compose import compose
from .algebra.groups import thirds
from .algebra.router import Routing, frontier, route
from .algebra.routes import format_route, parse_route
from .algebra.snapshot import Increment, Snapshot, apply, snapshot
from .algebra.ties import dare, ties
from .attach import Attached, attach, detach
from .capture import capture
from .config import AdapterConfig, RanklessConfig
from .errors import LoraLiteError, LoraLiteWarning
from .io import load, save
from .merge import delta_bias, delta_weight, merge, unmerge
from .peft.export import export_peft
from .peft.load import load_peft
from .registry import config, get, names, register
from .runtime import Status, disabled, param_groups, repair, scale, status
from .spec import ParamSpec
from .targets import find_targets
from .version import __version__


def __getattr__(name: str) -> type[AdapterConfig]:
    """The config class of every registered variant: `ll.LoRAConfig`."""
    return registry.config_class(name)


def __dir__() -> list[str]:
    return [*globals(), *registry.config_classes()]
