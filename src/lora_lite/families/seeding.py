"""SeededSubspace: methods that train k directions U v of an output subspace, started where labelled or plain data points."""

import torch

from ..calibration.norms import at_layer, in_stream
from ..calibration.statistics import Stats
from ..contract import ParamSpec, Specs, dataclass
from ..contract.annotations import Any, Float, Literal, Parameter, Tensor
from ..contract.spec import normal
from ..mathematics.maps import lin
from ..mathematics.spectrum import orth, top_eigenvectors
from .basis import contrast, contrast_names, has_contrast, moment
from .subspace import OutputSubspace, SubspaceConfig


@dataclass(frozen=True, kw_only=True)
class SeededConfig(SubspaceConfig):
    """For methods that train k directions of the subspace.

    k               number of directions, at most r
    seed_direction  contrast: the first is m, the difference of the two classes' mean outputs; where a norm follows on the layer
                    (calibration/norms.py), L^T L m: what takes L m off what the norm gives on; variance: those of the largest
                    mean square of y - b, which is also where the ones behind m come from; random;
                    auto: the first of these that the calibration data allows
    add_contrast    where m is the seed, the basis starts with it and drops its own last column: m lies in span(U)
    """

    k: int = 1
    seed_direction: Literal["auto", "contrast", "variance", "random"] = "auto"
    add_contrast: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.r:
            self.refuse("k", self.k, f"1 to r={self.r}")
        if not self.add_contrast and self.seed_direction in ("variance", "random"):
            self.refuse("add_contrast", False, f"True with seed_direction={self.seed_direction!r}: nothing would use it")

    def uses(self) -> dict[str, bool]:
        return {**super().uses(), "positions": True, "winsorize": True}


class SeededSubspace(OutputSubspace):
    """Parent of the methods with trained directions U v; a child adds to `core_specs`."""

    v: Float[Parameter, "r k"]

    @staticmethod
    def core_specs(cfg: Any) -> Specs:
        return {"v": ParamSpec((cfg.r, cfg.k), normal(cfg.r**-0.5))}

    @staticmethod
    def needs(cfg: Any) -> tuple[str, ...]:
        contrast = contrast_names(cfg) if cfg.seed_direction == "contrast" else ()
        variance = cfg.seed_direction == "variance" or (contrast and cfg.k > 1)
        return (*OutputSubspace.needs(cfg), *contrast, *(("y_moment",) if variance else ()))

    @staticmethod
    def wants(cfg: Any) -> tuple[str, ...]:
        return (*contrast_names(cfg), "y_moment", "norm")

    def orient(self, path: str, stats: Stats, W: Float[Tensor, "o i"], U: Float[Tensor, "o r"]) -> None:
        first, seed = None, self.cfg.seed_direction
        if seed in ("auto", "contrast") and has_contrast(self.cfg, stats):
            m = contrast(self.cfg, stats, path, U)
            if "norm" in stats and len(norm := stats["norm"][path]):
                m = at_layer(in_stream(m, norm), norm)
            U = orth(torch.cat([m[:, None], U[:, :-1]], dim=1)) if self.cfg.add_contrast else U
            first = U.T @ m
        super().orient(path, stats, W, U)
        if first is not None or (seed != "random" and "y_moment" in stats):
            H = U.T @ moment(stats, "y_moment", path, U) @ U if "y_moment" in stats else torch.eye(U.shape[1]).to(U)
            self.v.copy_(leading(H, self.cfg.k, first))


def leading(H: Float[Tensor, "r r"], k: int, first: Tensor | None = None) -> Float[Tensor, "r k"]:
    """The k leading eigenvectors of H; with `first` (r,) that direction and the k - 1 leading ones orthogonal to it."""
    if first is None:
        return top_eigenvectors(H, k)[0]
    v = first / first.norm()
    P = torch.eye(len(v), dtype=H.dtype, device=H.device) - torch.outer(v, v)
    others, _ = top_eigenvectors(P @ H @ P - H.trace() * torch.outer(v, v), k - 1)  # v goes last where H is not of full rank
    return torch.cat([v[:, None], others], dim=1)


def along(t: Float[Tensor, "... o"], D: Float[Tensor, "o k"], strength: Tensor) -> Float[Tensor, "... o"]:
    """D diag(strength) D^T t; strength (..., k) multiplies in its own precision."""
    h = lin(t, D.T)
    return lin((strength * h).to(h.dtype), D)
