"""The conformance suite: is a class a lawful variant? It runs on classes of this and of any other repository.

    from lora_lite.testing import check_variant, checks

    check_variant(Mine)                                           # all checks, the first broken promise raises

    @pytest.mark.parametrize("check", checks(Mine, MineConfig(r=4)), ids=str)
    def test_contract(check):
        check()

`pytest --pyargs lora_lite.testing` runs it over every registered variant, plugins included.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from ..contract import registry
from ..contract.adapter import Adapter
from ..contract.config import AdapterConfig
from ..errors import LoraLiteWarning
from . import toy
from .checks import CHECKS


@dataclass(frozen=True)
class Check:
    """One promise for one variant; call it. Raises AssertionError with the broken promise."""

    cls: type[Adapter]
    cfg: AdapterConfig
    function: Callable[[type[Adapter], AdapterConfig], None]

    def __call__(self) -> None:
        with registry.borrowed(self.cls), warnings.catch_warnings():
            warnings.simplefilter("ignore", LoraLiteWarning)  # coefficients and layers outside a variant's safe range
            warnings.filterwarnings("ignore", "(?s).*should not be instantiated", DeprecationWarning)  # torch, while tracing
            self.function(self.cls, self.cfg)

    def __str__(self) -> str:
        return f"{getattr(self.cls, 'variant', self.cls.__name__)}-{self.function.__name__}"


def checks(variant: str | type[Adapter], cfg: AdapterConfig | None = None) -> list[Check]:
    """The checks for a variant, by name or class; with its defaults at a small rank, or with `cfg`."""
    cls = registry.get(variant) if isinstance(variant, str) else variant
    cfg = toy.small(cls) if cfg is None else cfg
    return [Check(cls, cfg, function) for function in CHECKS]


def check_variant(variant: str | type[Adapter], cfg: AdapterConfig | None = None) -> None:
    """Run every check. Raises AssertionError at the first broken promise, LoraLiteError where the class is no variant."""
    for check in checks(variant, cfg):
        try:
            check()
        except AssertionError as broken:
            raise AssertionError(f"{check}: {broken}") from broken
