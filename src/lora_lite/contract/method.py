"""Method: what the author of a variant writes, and the words that stand ready inside it. Adapter (adapter.py) does the rest."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from ..errors import LoraLiteError
from .claims import Claims
from .config import AdapterConfig
from .kept import Kept, reusable
from .spec import ParamSpec

T = TypeVar("T")
Stats = Any  # calibration's Stats: stats[name][path], stats["weight"][path]


class Method(nn.Module):
    """The contract of a variant: `Config`, `param_specs`, and `forward` or `forward_input`; the other methods are optional.

    `self.cfg` is the frozen config of this layer, `self.s` its scale alpha / r, `self.coeff` the runtime coefficient: a float
    or, inside `forward`, a tensor with axes of size 1 appended so that it broadcasts against y. Declared tensors are attributes
    under their names. docs/writing-a-variant.md explains every word.
    """

    Config: ClassVar[type[AdapterConfig]]
    variant: ClassVar[str]
    citation: ClassVar[str] = ""
    listed: ClassVar[bool] = True  # False: what the library itself makes, no method to choose
    claims: ClassVar[Claims] = Claims()

    d_in: int
    d_out: int
    cfg: Any
    report: dict[str, float]  # what group_init measured, such as the captured share of a statistic

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ParamSpec]:
        """Every tensor of the method for one layer; nothing is computed here."""
        raise LoraLiteError("param_specs is missing.", expected="A variant declares its tensors.")

    @staticmethod
    def needs(cfg: Any) -> tuple[str, ...]:
        """Names of the statistics that `ranks` and `group_init` cannot do without (see calibration/statistics.py).

        For "wgrad" the loss is `cfg.loss_fn(model, batch)` where the config has such a field, else calibration/losses.py's.
        """
        return ()

    @staticmethod
    def wants(cfg: Any) -> tuple[str, ...]:
        """Names of the statistics that `group_init` uses where calibration data is given."""
        return ()

    @staticmethod
    def ranks(adapters: dict[str, Any], stats: Stats, cfg: Any) -> dict[str, int]:
        """Ranks that the statistics give the layers, 0 for none, before anything is filled; {} keeps the config's.

        Asked where the config has no rank_pattern; what it says is written there, so that load needs no data.
        """
        return {}

    @staticmethod
    def upgraded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A layer's tensors as a file has them, under the names of `param_specs` where an earlier version had others."""
        return tensors

    def init(self, W: Tensor) -> None:
        """Fill tensors from W (d_out, d_in), a float32 copy of the weight (see Claims.reads_weight). Once, at attach."""

    @staticmethod
    def group_init(adapters: dict[str, Any], stats: Stats, cfg: Any) -> None:
        """Fill tensors of all adapters {path: adapter} of this attach from streamed statistics. Once, after every `init`."""

    def forward(self, x: Tensor, y: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """y' (..., d_out) from x (..., d_in), y = W x + b and base(z) = W z. Of an input-side method: x' from x."""
        if y is None and self.changes_input():
            return self.forward_input(x)
        raise LoraLiteError(f"{type(self).__name__} has no output side.", expected="forward(self, x, y, base).")

    def forward_input(self, x: Tensor) -> Tensor:
        """x' (..., d_in) from x (..., d_in)."""
        raise LoraLiteError(f"{type(self).__name__} has no input side.", expected="forward_input(self, x).")

    @property
    def s(self) -> float:
        """The scale alpha / r, or alpha / sqrt(r) with rslora."""
        return self.cfg.s

    @functools.cached_property
    def kept(self) -> Kept:
        return Kept()

    def reuse(self, make: Callable[[], T], *of: Tensor | float, base: Any = None) -> T:
        """make(); with gradients off, the result of the call before where `of` and the weight of `base` are what they were."""
        return self.kept(make, of, base) if reusable(of, self._buffers.values(), base) else make()

    @classmethod
    def changes_input(cls) -> bool:
        return cls.forward_input is not Method.forward_input

    @classmethod
    def changes_output(cls) -> bool:
        return cls.forward is not Method.forward
