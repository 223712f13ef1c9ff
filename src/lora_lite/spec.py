"""ParamSpec and the start functions: the name that users have; it stands in contract/spec."""

from .contract.spec import *
