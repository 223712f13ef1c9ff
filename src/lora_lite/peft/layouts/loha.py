"""PEFT's type LOHA: the same four factors."""

from ..layout import Key, Layout

LAYOUT = Layout(
    peft_type="LOHA",
    tensors={name: Key(f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
    options={"r": "r", "alpha": "alpha"},
    patterns=True,
    unread=("init_weights", "use_effective_conv2d"),
    scaled="w1_a",
)
