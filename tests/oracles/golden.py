"""Inputs of the golden values of objectives and geometry, float64: hidden states, attention maps, two masks."""

import torch


def hidden():
    """h[b,t,d] = sin(1 + 1.7 b + .9 t + .35 d (t + 1)), (2, 5, 4)."""
    b, t, d = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (2, 5, 4)), indexing="ij")
    return (1 + 1.7 * b + 0.9 * t + 0.35 * d * (t + 1)).sin()


def maps():
    """softmax over s <= t of cos(.5 b + .8 l + 1.3 h + .6 t s + .2 s); two layers of (2, 3, 4, 4)."""
    b, l, h, t, s = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (2, 2, 3, 4, 4)), indexing="ij")
    scores = (0.5 * b + 0.8 * l + 1.3 * h + 0.6 * t * s + 0.2 * s).cos()
    return list(scores.masked_fill(s > t, -torch.inf).softmax(-1).unbind(1))


ONES = torch.ones(2, 5)
RAGGED = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
MASKS = {"all ones": ONES, "ragged": RAGGED}
