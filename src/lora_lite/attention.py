"""Attention maps and traces of recorded calls: the name that users have; it stands in observe/attention."""

from .observe.attention import *
