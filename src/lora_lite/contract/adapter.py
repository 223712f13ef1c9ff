"""Adapter: the module that hangs under a layer, owns its tensors, its coefficient, its hooks and every cast."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraLiteError
from ..sites.layer import Base, Layer
from .attachment import NOWHERE, Group, Original
from .config import AdapterConfig
from .method import Method
from .shared import Shared, leading
from .spec import ParamSpec, drawn


class Adapter(Method):
    """A variant: subclass it, write the methods of `Method`, and `register` it.

    Tensors are built from `param_specs` as parameters or buffers under their declared names.
    """

    values: Tensor | None  # `maps.distinct` of a coefficient tensor that is not trained
    common: float | Tensor | None  # the coefficient of all layers, where `scale` by groups multiplies it
    fired: bool
    path: str  # of its layer, seen from the module that was attached to
    group: Group
    original: Original | None  # while merged
    handles: list[torch.utils.hooks.RemovableHandle]
    shared: dict[str, Shared]

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

    @functools.cached_property
    def declared(self) -> dict[str, ParamSpec]:
        return type(self).param_specs(self.d_in, self.d_out, self.cfg)

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
