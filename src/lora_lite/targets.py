"""Selection and layers: the name that users have; it stands in core/selection, sites/layer and sites/model."""

from .core.selection import *
from .sites.layer import *
from .sites.model import *
