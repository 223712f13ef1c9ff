"""What a variant file imports to write its class; the types of its annotations are in annotations.py."""

from dataclasses import dataclass

from .adapter import Adapter, Claims
from .config import AdapterConfig, RanklessConfig
from .registry import register
from .spec import ParamSpec

Specs = dict[str, ParamSpec]

__all__ = ["Adapter", "AdapterConfig", "Claims", "ParamSpec", "RanklessConfig", "Specs", "dataclass", "register"]
