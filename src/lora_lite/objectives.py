"""Terms of a loss on what a model represents: the name that users have; it stands in observe/objectives."""

from .observe.objectives import *
