"""lora_lite: a LoRA-family method is one file of mathematics; everything else is given."""

from . import registry
from .adapter import Adapter, Claims
from .attach import Attached, attach, detach
from .config import AdapterConfig, RanklessConfig
from .errors import LoraLiteError, LoraLiteWarning
from .io import load, save
from .merge import delta_weight, merge, unmerge
from .registry import config, get, names, register
from .runtime import Status, disabled, param_groups, scale, status
from .spec import ParamSpec
from .targets import find_targets
from .version import __version__


def __getattr__(name: str) -> type[AdapterConfig]:
    """The config class of every registered variant: `ll.LoRAConfig`."""
    return registry.config_class(name)


def __dir__() -> list[str]:
    return [*globals(), *registry.config_classes()]
