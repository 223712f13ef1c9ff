"""PEFT's type LOKR: the same matrices, whole or factored by the same rule."""

from ..layout import Key, Layout

LAYOUT = Layout(
    peft_type="LOKR",
    tensors={name: Key(f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    options={"r": "r", "alpha": "alpha", "factor": "decompose_factor", "decompose_both": "decompose_both"},
    patterns=True,
    unread=("init_weights", "use_effective_conv2d", "rank_dropout_scale"),
    scaled="w1 w1_a",
)
