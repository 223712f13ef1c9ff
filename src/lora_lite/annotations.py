"""The words of a variant's annotations: the name that users have; it stands in contract/annotations."""

from .contract.annotations import *
