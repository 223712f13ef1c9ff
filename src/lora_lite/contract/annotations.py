"""The words of a variant's annotations: `A: Float[Parameter, "r i"]`, `U: Float[Tensor, "o k"]`."""

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

__all__ = ["Any", "Float", "Literal", "Parameter", "Tensor"]
