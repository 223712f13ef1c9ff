"""What a variant is: the declaration of its tensors, its options, its claims, and the module that runs its mathematics.

It promises that whatever registers here can be attached, scaled, saved, merged and tested, and it knows no method by name. This
is what a variant's author imports from: the class to write (`Adapter`, whose methods method.py explains), the parent of its
options, `ParamSpec` with the start functions, `Claims`, `register`, the words of annotations, and the limits that `param_specs`
checks. How an adapter hangs under a layer (adapter.py), shared tensors and reuse are nobody's business outside the core.
"""

from dataclasses import dataclass

from .adapter import Adapter
from .annotations import Any, Float, Literal, Parameter, Tensor
from .claims import Claims
from .config import AdapterConfig, RanklessConfig
from .limits import largest_divisor, refuse_indivisible, refuse_odd, refuse_rank
from .registry import register
from .spec import ParamSpec, Shape, constant, kaiming, normal, ones, uniform, zeros

Specs = dict[str, ParamSpec]

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Any",
    "Claims",
    "Float",
    "Literal",
    "ParamSpec",
    "Parameter",
    "RanklessConfig",
    "Shape",
    "Specs",
    "Tensor",
    "constant",
    "dataclass",
    "kaiming",
    "largest_divisor",
    "normal",
    "ones",
    "refuse_indivisible",
    "refuse_odd",
    "refuse_rank",
    "register",
    "uniform",
    "zeros",
]
