"""Sums over data: streams batches through the frozen model and adds up the statistics that methods ask for by name.

It promises that no activation is kept, that padding does not count, that how the data is cut into batches does not matter, and
that sums stay within a stated share of the model's memory. statistics.py lists the names, measure.py and recorder.py add up,
passes.py takes layers in turns, calls.py runs the model. A variant's author takes `require_tokens` and the type `Loss`.
"""

from .calls import Loss
from .statistics import Stats, require_tokens

__all__ = ["Loss", "Stats", "require_tokens"]
