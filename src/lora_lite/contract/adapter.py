"""Adapter: the module that hangs under a layer, owns its tensors, its coefficient, its hooks and every cast."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraLiteError
from ..sites.layer import Base, Layer, by_keyword, no_tensor, place_of_input
from ..sites.offloaded import with_tensors
from . import rows
from .attachment import NOWHERE, Group, Original
from .config import AdapterConfig
from .here import HERE, Setting, setting
from .method import Method
from .shared import Shared, leading
from .spec import ParamSpec, drawn, refuse_declaration


class Adapter(Method):
    """A variant: subclass it, write the methods of `Method`, and `register` it. What `param_specs` declares is built under its
    name, as a parameter or buffer.
    """

    set_coeff: float | Tensor  # the coefficient as it was set
    input_place: tuple[int, str]  # where the layer's forward takes its activation
    behind_router: bool  # whether the layer stands behind a router
    batch_leads: bool  # whether the layer is known to see (batch, time, ...)
    set_values: Tensor | None  # `maps.distinct` of a coefficient tensor that is not trained
    common: float | Tensor | None  # the coefficient of all layers, where `scale` by groups multiplies it
    fired: bool
    hung_as: str  # its name as a child of the layer
    path: str  # of its layer from the module that was attached to
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
            d_in=d_in, d_out=d_out, cfg=cfg, set_coeff=cfg.coeff, set_values=None, common=None,
            fired=False, path="", hung_as="", group=NOWHERE, original=None, handles=[], shared={}, report={},
            input_place=(0, "input"), behind_router=False, batch_leads=False,
        )  # fmt: skip
        refuse_declaration(self, self.specs())
        for name, spec in self.specs().items():
            dtype = (matrix_dtype if not spec.trainable and len(spec.shape) > 1 else None) or cfg.dtype
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
        """Hang under the layer as a child of the group's name, in train or eval mode as the layer is."""
        self.path, self.group, self.hung_as = path, group, group.child
        self.train(layer.training)
        group.paths.add(path)
        layer.add_module(group.child, self)
        self.hook(layer)

    def hook(self, layer: nn.Module) -> None:
        """Bound methods, so that a deep copy of the model calls the copy of the adapter."""
        self.input_place = place_of_input(type(layer).forward)
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
        if getattr(layer, self.group.child, None) is self:
            delattr(layer, self.group.child)

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

    @property
    def coeff(self) -> float | Tensor:
        """The coefficient of this call; in one with a tensor of them, that with axes of size 1 up to those of y."""
        lent = HERE.lent
        return setting(self).coeff if lent is None or lent[0] is not self else lent[1]

    @coeff.setter
    def coeff(self, coeff: float | Tensor) -> None:
        self.take(Setting(coeff))

    @property
    def values(self) -> Tensor | None:
        """Its distinct numbers, where it is a tensor that is not trained."""
        return setting(self).values

    def take(self, new: Setting, common: float | Tensor | None = None) -> None:
        """Hold coefficients; one that is a parameter of the caller's does not become one of the adapter's."""
        vars(self).update(set_coeff=new.coeff, set_values=new.values, common=common)

    def idle(self, coeff: float | Tensor) -> bool:
        """No work to do: disabled, the coefficient is exactly 0, or the weight already holds the change."""
        return self.original is not None or (not isinstance(coeff, Tensor) and coeff == 0.0)

    def _replicate_for_data_parallel(self) -> "Adapter":
        """A replica runs in a thread of its own, with the coefficient of the thread that made it."""
        replica = super()._replicate_for_data_parallel()
        replica.take(setting(self), self.common)
        return replica

    def input_hook(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        stands = kwargs is not None and layer._modules.get(self.hung_as) is self
        return (self if stands else self.standing_on(layer, kwargs)).changed_input(layer, args, kwargs or {})

    def changed_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        object.__setattr__(self, "fired", True)
        coeff = setting(self).coeff
        if self.idle(coeff):
            return None
        at, name = self.input_place
        given = len(args) > at
        name = name if given else by_keyword(layer, name, kwargs)
        x = args[at] if given else kwargs[name]
        if not isinstance(x, Tensor):
            raise no_tensor(layer, "is given", x)
        changed = self.call_by_row((x,)) if x.is_nested or isinstance(coeff, Tensor) else self.call_input(x).to(x.dtype)
        return ((*args[:at], changed, *args[at + 1 :]), kwargs) if given else (args, {**kwargs, name: changed})

    def output_hook(
        self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, y: Any = None
    ) -> Tensor | None:
        if y is None or layer._modules.get(self.hung_as) is not self:
            return self.standing_on(layer, None if y is None else kwargs).changed_output(layer, args, kwargs, y)
        return self.changed_output(layer, args, kwargs, y)

    def changed_output(self, layer: Layer, args: tuple[Any, ...], kwargs: Any, y: Any) -> Tensor | None:
        object.__setattr__(self, "fired", True)
        coeff = setting(self).coeff
        if self.idle(coeff):
            return None
        at, name = self.input_place
        x = args[at] if len(args) > at else kwargs[by_keyword(layer, name, kwargs)]
        if not isinstance(y, Tensor):
            raise no_tensor(layer, "returns", y)
        if y.is_nested or isinstance(coeff, Tensor):
            return self.call_by_row((x, y), Base(layer))
        return self(x, y, Base(layer)).to(y.dtype)

    def call_input(self, x: Tensor) -> Tensor:
        """x' of the input side; by a call of the module, which other libraries watch, where there is no other side."""
        return with_tensors(self, self.forward_input, x) if self.changes_output() else self(x, None, None)

    def call_by_row(self, tensors: tuple[Tensor, ...], *base: Base) -> Tensor:
        """The last of (x,) or (x, y) as it is changed: where rows have coefficients of their own, or samples lengths.

        Rows at coefficient 0 are those of the base bit for bit, also where the adapter overflows; a coefficient that is to be
        trained has a gradient at 0 as well.
        """
        ragged = rows.Ragged(tensors[-1]) if tensors[-1].is_nested else None
        tensors = tuple(ragged.flat(one) for one in tensors) if ragged else tensors
        z, coeffs, lent, zero = tensors[-1], setting(self).coeff, HERE.lent, None
        if isinstance(coeffs, Tensor):
            coeff = ragged.spread(self, coeffs) if ragged else rows.aligned(self, coeffs, tensors[0], z)
            zero = None if coeff.requires_grad else coeff == 0
            if zero is not None and z.dtype is torch.float16:  # the gradients of numbers that overflowed are not numbers
                tensors = tuple(torch.where(zero, 0.0, one) for one in tensors)
            HERE.lent = (self, coeff)
        try:
            new = (self(*tensors, *base) if base else self.call_input(*tensors)).to(z.dtype)
        finally:
            HERE.lent = lent
        new = new if zero is None else torch.where(zero, z, new)
        return ragged.whole(new) if ragged else new

    def standing_on(self, layer: nn.Module, kwargs: Any) -> "Adapter":
        """The adapter of a layer that took our hooks over: a replica's own. Raises LoraLiteError where there is none."""
        own = layer._modules.get(self.hung_as)
        if kwargs is not None and isinstance(own, type(self)):
            return own
        raise LoraLiteError(
            f"{type(layer).__name__} took over the hooks of adapter {self.group.name!r} and not the adapter.",
            expected="The layers that were there at attach: another program put new ones in their place.",
            fix="ll.save(model, path); ll.detach(model)  # then exchange the layers, then ll.load(model, path)",
        )

    def extra_repr(self) -> str:
        return f"{self.variant}, {self.d_in} -> {self.d_out}, coeff={self.set_coeff}"
