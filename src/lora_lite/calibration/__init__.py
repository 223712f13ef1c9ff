"""Sums over data: streams batches through the frozen model and adds up the statistics that methods ask for by name.

It promises that no activation is kept, that padding does not count, that how the data is cut into batches does not matter, and
that sums stay within a stated share of the model's memory. statistics.py lists the names, measure.py and recorder.py add up,
tokens.py and scopes.py say which tokens a layer sees, passes.py takes layers in turns, calls.py runs the model. A variant's
author takes `require_tokens`, `require_rank` with `resolved`, and the type `Loss`.
"""

from .enough import TooLittleData, require_rank, require_tokens, resolved
from .losses import Loss
from .norms import at_layer, norms_behind
from .statistics import Stats

__all__ = ["Loss", "Stats", "TooLittleData", "at_layer", "norms_behind", "require_rank", "require_tokens", "resolved"]
