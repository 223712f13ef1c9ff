"""Ensemble: whole adapters side by side on the output of a layer, which also holds for those that have no change of weight.

formula   y' = y + c sum_i c_i (f_i(x, y) - y),  f_i the layer with adapter i alone at coefficient 1;  c = coeff
"""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass

from torch import nn
from torch.func import functional_call

from ..contract import registry
from ..contract.adapter import Adapter
from ..contract.annotations import Any, Float, Tensor
from ..contract.claims import Claims
from ..contract.config import AdapterConfig, RanklessConfig
from ..contract.kinds import accepts
from ..contract.spec import ParamSpec
from ..contract.strict import parsed
from ..errors import LoraLiteError, some

MEMBER, MOST = {"variant", "config", "weights"}, 1024


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig(RanklessConfig):
    """members  one JSON text each: variant, its config, and {layer path: weight}"""

    members: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.members:
            member = parsed(text, "A member of an ensemble")
            if not isinstance(member, dict) or member.keys() != MEMBER or not isinstance(member["config"], str):
                self.refuse("members", text, f"JSON texts of {some(sorted(MEMBER))}")
            weights = member["weights"]
            if not isinstance(weights, dict) or not weights or not all(accepts(w, float | int) for w in weights.values()):
                self.refuse("members", text, "JSON texts with weights, a number for each path")

    def for_layer(self, path: str) -> "EnsembleConfig":
        """With the members that the layer has, their configs and their weights for it alone."""
        there = [member for text in self.members if path in (member := json.loads(text))["weights"]]
        return dataclasses.replace(self, members=tuple(at_layer(member, path, of(member).for_layer(path)) for member in there))

    def possible_at(self, path: str) -> "list[EnsembleConfig]":
        there = [member for text in self.members if path in (member := json.loads(text))["weights"]]
        options = [[at_layer(member, path, cfg) for cfg in of(member).possible_at(path)] for member in there]
        if (count := math.prod(map(len, options))) > MOST:
            raise LoraLiteError(f"The ranks of {path} may be {count} others.", expected=f"At most {MOST} in an older file.")
        return [dataclasses.replace(self.without_patterns(), members=chosen) for chosen in itertools.product(*options)]


def of(member: dict[str, Any]) -> AdapterConfig:
    return registry.get(member["variant"]).Config.from_file(member["config"])


def at_layer(member: dict[str, Any], path: str, cfg: AdapterConfig) -> str:
    return json.dumps({**member, "config": cfg.to_json(), "weights": {path: member["weights"][path]}})


class Alone(nn.Module):
    """One member as a function of its tensors."""

    def __init__(self, adapter: Adapter):
        super().__init__()
        self.adapter = adapter

    def forward(self, x: Tensor, y: Tensor, base: Any) -> Tensor:
        if self.adapter.changes_input():
            x = self.adapter.forward_input(x).to(x.dtype)
            y = base(x) if base.bias is None else base(x) + base.bias
        return self.adapter.forward(x, y, base).to(y.dtype) if self.adapter.changes_output() else y


@registry.register(name="ensemble")
class Ensemble(Adapter):
    """Tensors of member k under m<k>_<name>, all frozen."""

    Config = EnsembleConfig
    claims = Claims(affine=False)
    listed = False

    def __init__(self, d_in: int, d_out: int, cfg: EnsembleConfig, **place: Any):
        super().__init__(d_in, d_out, cfg, **place)
        self.members = tuple(
            (weight, Alone(member), tuple(member.specs()))  # in a tuple, and without numbers: theirs are the ensemble's own
            for text in cfg.members
            for weight, member in [built(json.loads(text), d_in, d_out)]
        )

    @staticmethod
    def param_specs(d_in: int, d_out: int, cfg: EnsembleConfig) -> dict[str, ParamSpec]:
        members = [built(json.loads(text), d_in, d_out)[1] for text in cfg.members]
        return {
            f"m{k}_{name}": ParamSpec(spec.shape, trainable=False)
            for k, member in enumerate(members)
            for name, spec in member.specs().items()
        }

    def forward(self, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], base: Any) -> Float[Tensor, "... o"]:
        change = 0.0
        for k, (weight, alone, names) in enumerate(self.members):
            tensors = {f"adapter.{name}": getattr(self, f"m{k}_{name}") for name in names}
            change = change + weight * (functional_call(alone, tensors, (x, y, base)) - y)
        return y + self.coeff * change


def built(member: dict[str, Any], d_in: int, d_out: int) -> tuple[float, Adapter]:
    """(weight, adapter without numbers at coefficient 1) of a member that is down to one layer."""
    cls = registry.get(member["variant"])
    adapter = cls(d_in, d_out, cls.Config.from_file(member["config"]), device="meta")
    adapter.coeff = 1.0
    return next(iter(member["weights"].values())), adapter
