"""PEFT's type DELORA: without a frozen copy of the start; the norms of the weight's columns are stored."""

from ..layout import Key, Layout

LAYOUT = Layout(
    peft_type="DELORA",
    tensors={"A": Key("delora_A"), "B": Key("delora_B"), "lam": Key("delora_lambda"), "w": Key("delora_w_norm")},
    only={"start": "zero_b"},
    options={"r": "r"},
    patterns=True,
    unread=("delora_lambda", "lambda_pattern", "init_weights"),
)
