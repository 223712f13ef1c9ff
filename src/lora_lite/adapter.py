"""Adapter: the module that hangs under a layer, owns its tensors, its coefficient, its hooks and every cast."""

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .config import AdapterConfig
from .errors import LoraLiteError
from .kept import Kept, reusable
from .shared import Shared, leading
from .spec import ParamSpec, drawn
from .targets import Base, Layer

T = TypeVar("T")
Stats = Any  # calibrate.Stats: stats[name][path], stats["weight"][path]


@dataclass(frozen=True)
class Claims:
    """What a variant promises at every parameter value; selects the checks of the conformance suite.

    affine       for fixed parameters the adapted layer is an affine map of x; needed for merge and delta_weight
    contraction  for coeff in [0, 1] outputs are never further apart than those of the base layer
    isometry     at coeff 1 the adapter's own map is orthogonal (of x for input-side methods, of y - b otherwise)
    rank         cfg -> largest rank of the weight change, None where there is no such bound
    safe_coeff   range of coeff inside which the promises hold; `scale` warns outside
    start        largest |y' - y| / max|y| right after attach; 0 means bit for bit
    reads_weight whether `init` reads W; False spares the copy: W comes on the meta device, with a shape and no numbers
    """

    affine: bool = True
    contraction: bool = False
    isometry: bool = False
    rank: Callable[[Any], int] | None = None
    safe_coeff: tuple[float, float] | None = None
    start: float = 0.0
    reads_weight: bool = True


class Original(NamedTuple):
    """What a merge exchanges on a layer; kind is its class, which changes where a packed layer becomes a dense one."""

    weight: Any
    bias: Any
    kind: type[Layer]


@dataclass
class Lineage:
    """One training: its id is new at attach and travels with snapshots and checkpoints; step counts the snapshots taken."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    step: int = 0


@dataclass
class Group:
    """What the adapters of one attach share: name, config, the base's requires_grad before any attach, their lineage, the hooks
    that keep quantised layers of the model trainable, and the layers' paths."""

    name: str
    cfg: AdapterConfig
    base_flags: dict[str, bool]
    lineage: Lineage = field(default_factory=Lineage)
    handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)


NOWHERE = Group("", AdapterConfig(), {})
"""The group of an adapter that is not installed."""


class Adapter(nn.Module):
    """A variant: subclass it, give `Config`, `param_specs` and `forward` or `forward_input`, and `register` it.

    Tensors are built from `param_specs` as parameters or buffers under their declared names. `self.cfg` is the frozen config
    of this layer, `self.s` its scale alpha / r, `self.coeff` the runtime coefficient: a float or, inside `forward`, a tensor
    with axes of size 1 appended so that it broadcasts against y.
    """

    Config: ClassVar[type[AdapterConfig]]
    variant: ClassVar[str]
    citation: ClassVar[str] = ""
    listed: ClassVar[bool] = True  # False: what the library itself makes, no method to choose
    claims: ClassVar[Claims] = Claims()

    d_in: int
    d_out: int
    cfg: Any
    coeff: float | Tensor
    values: Tensor | None  # `linalg.distinct` of a coefficient tensor that is not trained
    common: float | Tensor | None  # the coefficient of all layers, where `scale` by groups multiplies it
    fired: bool
    path: str  # of its layer, seen from the module that was attached to
    group: Group
    original: Original | None  # while merged
    handles: list[torch.utils.hooks.RemovableHandle]
    shared: dict[str, Shared]
    report: dict[str, float]  # what group_init measured, such as the captured share of a statistic

    def __init__(
        self, d_in: int, d_out: int, cfg: AdapterConfig, *, device: Any = None, matrix_dtype: torch.dtype | None = None
    ):
        """Build the declared tensors, unfilled. matrix_dtype: of frozen matrices; parameters and vectors are in cfg.dtype."""
        super().__init__()
        # State stands on the instance: torch.compile compiles again where an instance overrides a default of the class. All
        # at once: nn.Module looks for parameters at every assignment, which is a third of the time that building takes.
        vars(self).update(
            d_in=d_in, d_out=d_out, cfg=cfg, coeff=cfg.coeff, values=None, common=None, fired=False, path="", group=NOWHERE,
            original=None, handles=[], shared={}, report={},
        )  # fmt: skip
        for name, spec in self.specs().items():
            if hasattr(type(self), name) or name in vars(self):
                raise LoraLiteError(
                    f"{type(self).__name__} declares a tensor {name!r}.",
                    expected="A tensor's name must not be an attribute that Adapter already has.",
                    fix=f'{{"{name}_": ParamSpec(...)}}',
                )
            frozen_matrix = not spec.trainable and len(spec.shape) > 1
            dtype = (matrix_dtype if frozen_matrix else None) or cfg.dtype
            tensor = torch.empty((0,) if spec.shared else spec.shape, dtype=dtype, device=device)
            if spec.trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                # views that overlap do not go into a file of safetensors; where they come from, the config's seed says
                self.register_buffer(name, tensor, persistent=not spec.shared)

    # --- the contract -------------------------------------------------------------------------------------------------

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: Any) -> dict[str, ParamSpec]:
        """Every tensor of the method for one layer; nothing is computed here."""
        raise LoraLiteError("param_specs is missing.", expected="A variant declares its tensors.")

    @staticmethod
    def needs(cfg: Any) -> tuple[str, ...]:
        """Names of the statistics that `ranks` and `group_init` cannot do without (see calibrate.py).

        For "wgrad" the loss is `cfg.loss_fn(model, batch)` where the config has such a field, else `measure.default_loss`.
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

    def init(self, W: Tensor) -> None:
        """Fill tensors from W (d_out, d_in), a float32 copy of the weight (see Claims.reads_weight). Once, at attach."""

    @staticmethod
    def group_init(adapters: dict[str, Any], stats: Stats, cfg: Any) -> None:
        """Fill tensors of all adapters {path: adapter} of this attach from streamed statistics. Once, after every `init`."""

    def forward(self, x: Tensor, y: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """y' (..., d_out) from x (..., d_in), y = W x + b and base(z) = W z."""
        raise LoraLiteError(f"{type(self).__name__} has no output side.", expected="forward(self, x, y, base).")

    def forward_input(self, x: Tensor) -> Tensor:
        """x' (..., d_in) from x (..., d_in)."""
        raise LoraLiteError(f"{type(self).__name__} has no input side.", expected="forward_input(self, x).")

    # --- what the core does with it -----------------------------------------------------------------------------------

    @classmethod
    def changes_input(cls) -> bool:
        return cls.forward_input is not Adapter.forward_input

    @classmethod
    def changes_output(cls) -> bool:
        return cls.forward is not Adapter.forward

    @property
    def s(self) -> float:
        """The scale alpha / r, or alpha / sqrt(r) with rslora."""
        return self.cfg.s

    @functools.cached_property
    def declared(self) -> dict[str, ParamSpec]:
        return type(self).param_specs(self.d_in, self.d_out, self.cfg)

    @functools.cached_property
    def kept(self) -> Kept:
        return Kept()

    def reuse(self, make: Callable[[], T], *of: Tensor | float, base: Any = None) -> T:
        """make(); with gradients off, the result of the call before where `of` and the weight of `base` are what they were."""
        return self.kept(make, of, base) if reusable(of, self._buffers.values(), base) else make()

    def specs(self) -> dict[str, ParamSpec]:
        """The declaration of every tensor, which the variant is asked for once."""
        return self.declared

    @torch.no_grad()
    def start(self, path: str) -> None:
        """Fill every tensor with its declared start value; random ones depend on seed, path and name alone."""
        for name, spec in self.specs().items():
            if not spec.shared:
                getattr(self, name).copy_(drawn(spec, spec.shape, self.cfg.seed, path, name))

    def share(self, name: str, holder: Shared) -> None:
        """Hold `name` together with others, as a view of the holder's tensor."""
        self.shared[name] = holder
        setattr(self, name, leading(holder.tensor, self.specs()[name].shape))

    def tensors(self) -> dict[str, Tensor]:
        """Every declared tensor by name; the state_dict leaves out those that layers share."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def own(self) -> dict[str, Tensor]:
        """Those that its state_dict has, which takes several times as long to make."""
        return {name: getattr(self, name) for name, spec in self.specs().items() if not spec.shared}

    def install(self, layer: Layer, path: str, group: Group) -> None:
        """Hang under the layer as a child of the group's name."""
        self.path, self.group = path, group
        group.paths.add(path)
        layer.add_module(group.name, self)
        self.hook(layer)

    def hook(self, layer: nn.Module) -> None:
        """Bound methods, so that a deep copy of the model calls the copy of the adapter."""
        if self.changes_input():
            self.handles.append(layer.register_forward_pre_hook(self.input_hook, with_kwargs=True))
        if self.changes_output():
            self.handles.append(layer.register_forward_hook(self.output_hook, with_kwargs=True))

    def unhook(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def hooked(self, layer: nn.Module) -> bool:
        """Whether every hook is in the tables that the layer has at this moment; other libraries clear and replace them."""
        before, after = layer._forward_pre_hooks.values(), layer._forward_hooks.values()
        return (self.input_hook in before or not self.changes_input()) and (
            self.output_hook in after or not self.changes_output()
        )

    def remove(self, layer: nn.Module) -> None:
        self.unhook()
        self.group.paths.discard(self.path)
        if getattr(layer, self.group.name, None) is self:
            delattr(layer, self.group.name)

    def _apply(self, fn: Any, recurse: bool = True) -> "Adapter":
        """model.to(...) also moves the original weights that a merge keeps aside; shared tensors move once for all."""
        super()._apply(fn, recurse)
        for name, holder in self.shared.items():
            self.share(name, holder.applied(fn))
        for tensor in self.original[:2] if self.original else ():
            if tensor is not None:
                tensor.data = fn(tensor.data)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Shared tensors are pickled with their holder, once; declarations hold functions, which do not go into a pickle."""
        views = dict.fromkeys(self.shared)
        state = {key: value for key, value in self.__dict__.items() if key not in ("declared", "kept")}
        return {**state, "_buffers": {**self._buffers, **views}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, holder in self.shared.items():
            self.share(name, holder)

    def take(self, coeff: float | Tensor, common: float | Tensor | None = None) -> None:
        """Hold coefficients; one that is a parameter of the caller's does not become one of the adapter's."""
        object.__setattr__(self, "coeff", coeff)
        object.__setattr__(self, "common", common)

    def idle(self) -> bool:
        """No work to do: the coefficient is exactly 0, or the weight already holds the change."""
        return self.original is not None or (not isinstance(self.coeff, Tensor) and self.coeff == 0.0)

    def input_hook(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.fired = True
        if self.idle():
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        with self.aligned(x):
            changed = self.forward_input(x).to(x.dtype)
        if args:
            return (changed, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): changed}

    def output_hook(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        self.fired = True
        if self.idle():
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        with self.aligned(y):
            return self.forward(x, y, Base(layer)).to(y.dtype)

    @contextlib.contextmanager
    def aligned(self, z: Tensor) -> Iterator[None]:
        """For the call: a coefficient tensor gets axes of size 1 up to those of z."""
        coeff = self.coeff
        if not isinstance(coeff, Tensor):
            yield
            return
        if coeff.ndim >= z.ndim or any(c not in (1, n) for c, n in zip(coeff.shape, z.shape)):
            raise LoraLiteError(
                f"The coefficient tensor has shape {tuple(coeff.shape)}.",
                expected=f"It must line up with the leading axes of activations of shape {tuple(z.shape)}.",
                fix=f"ll.scale(model, torch.ones({z.shape[0]}))  # one value per sample",
            )
        self.take(coeff.to(z.device).reshape(coeff.shape + (1,) * (z.ndim - coeff.ndim)), self.common)
        try:
            yield
        finally:
            self.take(coeff, self.common)

    def extra_repr(self) -> str:
        return f"{self.variant}, {self.d_in} -> {self.d_out}, coeff={self.coeff}"
