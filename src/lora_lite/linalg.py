"""Linear algebra of the variants: the name that users have; it stands in mathematics/."""

from .mathematics.maps import *
from .mathematics.rotations import *
