"""PEFT's type ROAD: flat vectors, the stored alpha is 1 + a."""

import torch

from ..layout import Key, Layout

LAYOUT = Layout(
    peft_type="ROAD",
    tensors={
        "theta": Key("road_theta", write=torch.flatten),
        "a": Key("road_alpha", write=lambda a: 1 + a.flatten(), read=lambda alpha: alpha - 1),
    },
    options={"mode": "variant", "group_size": "group_size"},
    unread=("init_weights",),
    derived=lambda adapter: {"group_size": 2 * adapter.theta.shape[2]},
)
