"""Training objectives on what a model represents, on top of any adapter: `loss = out.loss + objective(seen)`.

objective = ll.objectives.Gossip(weight=5, tau=0.5) + ll.objectives.L1()
with ll.capture(model, objective) as seen:
    out = model(**batch)
loss = out.loss + objective(seen)
"""

from .barrier import AttentionBarrier
from .base import Objective, Random, Sum, Summand
from .change import DeltaCosine, DeltaNorm
from .heads import HeadDiversity
from .hidden import L1, Gossip, Repulsion
from .parse import names, parse
