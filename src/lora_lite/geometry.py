"""Geometry of hidden states and weight changes: the name that users have; it stands in observe/geometry."""

from .observe.geometry import *
