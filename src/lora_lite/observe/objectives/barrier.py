"""AttentionBarrier: a penalty on how far the values that a query attends to spread. From pull request 88 of DataDog/toto.

formula   trace[b,h,t] = E_w |v|^2 - |E_w v|^2, w the causal softmax weights of query t;   x = alpha trace;   margin = 1 - x
          hard  min(cap, -ln max(margin, eps))
          soft  -ln margin where margin >= eps, -ln eps + (eps - margin) / eps beyond: value and slope are continuous
          value = mean over causal layers of the mean over batch, heads and valid queries
why       noise in one attention step leaves -ln det(I - alpha Cov_w(v)). For alpha trace < 1 the trace form is an upper bound
          of it, equal where the covariance has rank one
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...contract.pattern import fits
from ...core import finding
from ...core.coefficients import disabled
from ...errors import LoraLiteError, LoraLiteWarning, some
from ..attention import Call, causal, value_traces
from .base import Masks, Objective, mask_of
from .hidden import refuse_few

if TYPE_CHECKING:
    from ..seen import Forward, Seen

STEEP = 1e-4  # a soft barrier with a smaller eps has slopes above 1 / STEEP beyond it
QUANTILE, SHARE = 0.95, 0.5  # alpha="auto" puts this quantile of the base's trace at this share of the way to the barrier


def penalty(trace: Tensor, alpha: float, eps: float, cap: float, soft: bool) -> Tensor:
    """The hard or soft penalty of each trace; log1p keeps the digits of a margin near 1."""
    x = alpha * trace
    margin = 1 - x
    inside = torch.where(margin >= eps, -torch.log1p(-x.clamp_max(1 - eps)), -math.log(eps))
    return inside + (eps - margin).clamp_min(0) / eps if soft else inside.clamp_max(cap)


def quantile(values: Tensor, q: float) -> Tensor:
    """The value of nearest rank; torch.quantile stops at 16 million values."""
    return values.flatten().kthvalue(1 + round(q * (values.numel() - 1))).values


@dataclass(frozen=True, kw_only=True)
class AttentionBarrier(Objective):
    """Mean of -ln(1 - alpha trace) over causal self-attention, in training mode only; the defaults are those of the original.

    weight      factor in the loss
    alpha       multiplies the trace; the barrier stands at trace 1 / alpha. At 1e-4 the penalty is alpha trace to three digits,
                a tiny weight decay on the variance of the values. "auto": 0.5 / q95 of the trace of the base, which
                `calibrate(model, batches)` fixes before training
    eps         margin from which a constant (hard) or a straight line (soft) takes over
    cap         upper limit of the hard penalty; it binds for eps < exp(-cap) alone, 2.06e-9 for 20
    soft        slope alpha / eps beyond the barrier. The hard form has no gradient there: offenders are not pushed back
    layers      "causal": every causal self-attention. Among those choose names or regular expressions, searched in the path of
                the module that calls attention, or a function of a lora_lite.attention.Call
    skip_first  leave out the first valid query of a sequence, whose trace is 0 as it sees one key
    charge      "adapter": only what the adapters add, max(0, trace - trace of the base), with one more forward pass

    Recommended: alpha="auto", soft=True, eps=.01, weight=.1.
    """

    name: ClassVar[str] = "barrier"
    requires: ClassVar[frozenset[str]] = frozenset({"attention", "mask"})

    weight: float = 0.02
    alpha: float | Literal["auto"] = 1e-4
    eps: float = 1e-6
    cap: float = 20.0
    soft: bool = False
    layers: Literal["causal"] | tuple[str, ...] | Callable[[Call], bool] = "causal"
    skip_first: bool = False
    charge: Literal["model", "adapter"] = "model"
    calibrated: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha != "auto" and not 0 <= self.alpha < math.inf:
            self.refuse("alpha", self.alpha, 'a finite number of at least 0, or "auto"')
        if not 0 < self.eps < 1:
            self.refuse("eps", self.eps, "between 0 and 1", "AttentionBarrier(soft=True, eps=.01)")
        if self.cap <= 0:
            self.refuse("cap", self.cap, "above 0")
        if self.layers == ():
            self.refuse("layers", (), '"causal", at least one pattern, or a function of a call')
        if isinstance(self.layers, tuple):
            self.refuse_no_patterns("layers", self.layers)
        if self.soft and self.cap != AttentionBarrier.cap:
            self.refuse("cap", self.cap, "an option of the hard form", "AttentionBarrier(soft=True)")
        if self.soft and self.eps < STEEP:
            warnings.warn(
                f"AttentionBarrier(soft=True, eps={self.eps:g}): beyond the barrier the slope is alpha / eps, "
                f"{1 / self.eps:,.0f} alpha. eps=.01 is recommended",
                LoraLiteWarning,
                stacklevel=3,
            )

    # --- alpha ---

    @property
    def strength(self) -> float:
        """alpha as a number. Raises LoraLiteError for "auto" before `calibrate`."""
        if self.alpha != "auto":
            return self.alpha
        if "alpha" not in self.calibrated:
            raise LoraLiteError(
                "AttentionBarrier(alpha='auto') has no alpha yet.",
                expected="It is fixed before training, by the traces of the base on some batches.",
                fix="objective.calibrate(model, batches)",
            )
        return self.calibrated["alpha"]

    def calibrate(self, model: nn.Module, batches: Iterable[Any], *, mask: Masks = None) -> None:
        """Fix alpha = 0.5 / q95(trace) of the model in eval mode with its adapters off; a number given as alpha stays.

        batches  as for calibration_data: mappings, whose attention_mask drops padding, tuples or tensors
        mask     (B, T) of the attention calls, for a model that takes none: as for `mask_of`
        """
        if self.alpha != "auto":
            return
        from ...calibration.calls import call, evaluating, on_device, refuse_one_batch
        from ..capturing import capture

        refuse_one_batch(batches)
        traces = []
        with evaluating(model), disabled(model):
            for k, batch in enumerate(batches):
                with capture(model, self.requires, mask=mask_of(mask, k, batch)) as seen:
                    call(model, on_device(model, batch))
                traces += self.traces(seen.only)
        if not traces:
            raise LoraLiteError("There are no batches to calibrate on.", fix="objective.calibrate(model, [batch])")
        spread = float(quantile(torch.cat([trace.flatten().cpu() for trace in traces]), QUANTILE))
        if not 0 < spread < math.inf:
            raise LoraLiteError(
                f"The {QUANTILE:.0%} quantile of the trace is {spread:g} on these batches.",
                expected="Values that differ within a sequence, and finite ones.",
                fix="AttentionBarrier(alpha=0.1)  # a number of your own",
            )
        self.calibrated["alpha"] = SHARE / spread

    def state(self) -> Tensor | None:
        return torch.tensor(self.calibrated.get("alpha", math.nan), dtype=torch.float64) if self.alpha == "auto" else None

    def restore(self, state: Tensor) -> None:
        self.calibrated.clear()
        if not state.isnan():
            self.calibrated["alpha"] = float(state)

    def evaluating(self, seed: int = 0) -> "AttentionBarrier":
        made = super().evaluating(seed)
        assert isinstance(made, AttentionBarrier)
        made.calibrated.update(self.calibrated)
        return made

    # --- value ---

    def value(self, seen: "Seen") -> Tensor:
        """The unweighted value; 0 where the model is in eval mode."""
        if not seen.model.training:
            self.warn_eval(seen)
            return torch.zeros((), device=seen.device)
        if self.charge == "adapter":
            finding.present(seen.model, None)
        return super().value(seen)

    def warn_eval(self, seen: "Seen") -> None:
        if torch.is_grad_enabled() and any(call.v.requires_grad for forward in seen.forwards for call in forward.calls):
            warnings.warn(
                "AttentionBarrier acts in training mode only, and the model is in eval mode: model.train(), or torch.no_grad() "
                "to measure",
                LoraLiteWarning,
                stacklevel=4,
            )

    def of(self, forward: "Forward") -> Tensor:
        alpha, traces = self.strength, self.traces(forward)
        if self.charge == "adapter":
            with torch.no_grad():
                bases = self.valid_traces(forward, self.among(forward.base_calls()))
            traces = [(trace - base).clamp_min(0) for trace, base in zip(traces, bases, strict=True)]
        layers = [penalty(trace, alpha, self.eps, self.cap, self.soft).mean() for trace in traces]
        return torch.stack([layer.to(layers[0].device) for layer in layers]).mean()

    def traces(self, forward: "Forward") -> list[Tensor]:
        """(n, H) for each chosen layer: the trace at the n valid queries."""
        calls = self.among(forward.calls)
        if torch.is_grad_enabled() and forward.with_grad and any(not call.with_grad for call in calls):
            raise LoraLiteError(
                f"Attention of {some(call.layer for call in calls if not call.with_grad)} was recorded without a gradient.",
                expected="Non-reentrant checkpointing: the reentrant one runs its layers with gradients off.",
                fix='model.activation_checkpointing_enable({"use_reentrant": False})',
            )
        return self.valid_traces(forward, calls)

    @torch.no_grad()
    def attn_trace(self, seen: "Seen") -> dict[str, float]:
        """{mean, q95, beyond} of the trace over layers, heads and valid queries; beyond: the share with margin < eps."""
        seen.require(self.name, self.requires)
        pooled = torch.cat([trace.flatten().cpu() for forward in seen.forwards for trace in self.traces(forward)])
        beyond = 1 - self.strength * pooled < self.eps
        return {"mean": float(pooled.mean()), "q95": float(quantile(pooled, QUANTILE)), "beyond": float(beyond.float().mean())}

    # --- which layers, which queries ---

    def among(self, calls: Sequence[Call]) -> list[Call]:
        """The causal calls that `layers` takes. Raises LoraLiteError for none, and for a pattern that takes none."""
        found = causal(calls)
        if not found:
            raise LoraLiteError(
                f"No causal self-attention among {len(calls)} recorded calls.",
                expected="The barrier is defined for queries that see no later key.",
                found=f"Recorded: {some(dict.fromkeys(call.layer for call in calls))}.",
            )
        if self.layers == "causal":
            return found
        if isinstance(self.layers, tuple):
            patterns = self.layers
            for pattern in patterns:
                if not any(fits(pattern, call.layer) for call in found):
                    raise self.nothing(f"{pattern!r} selects no causal attention.", found)
            return [call for call in found if any(fits(pattern, call.layer) for pattern in patterns)]
        taken = [call for call in found if self.layers(call)]  # type: ignore[operator]
        if not taken:
            raise self.nothing("the function selects no causal attention.", found)
        return taken

    def nothing(self, what: str, found: list[Call]) -> LoraLiteError:
        layers = dict.fromkeys(call.layer for call in found)
        return LoraLiteError(
            f"layers: {what}", found=f"There is {some(layers)}.", fix=f"AttentionBarrier(layers=({next(iter(layers))!r},))"
        )

    def valid_traces(self, forward: "Forward", calls: list[Call]) -> list[Tensor]:
        return [self.valid(forward, call, trace) for call, trace in zip(calls, value_traces(calls))]

    def valid(self, forward: "Forward", call: Call, trace: Tensor) -> Tensor:
        """(n, H) of trace (B, H, T): the rows of the valid queries."""
        T, S = call.q.shape[-2], call.k.shape[-2]
        mask = forward.mask_for((trace.shape[0], S), "attention calls").to(trace.device)
        if self.skip_first:
            mask = mask & (mask.cumsum(1) > 1)
        offset = 0 if call.is_causal else S - T  # queries stand at the end of the keys, or with the flag at their beginning
        mask = mask[:, offset : offset + T]
        refuse_few(self.name, int(mask.sum()), 1)
        return trace.movedim(-1, 1)[mask].reshape(int(mask.sum()), -1)
