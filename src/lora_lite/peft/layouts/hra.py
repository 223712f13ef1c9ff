"""PEFT's type HRA without Gram-Schmidt: the same vectors as columns."""

from ..layout import Key, Layout

LAYOUT = Layout(
    peft_type="HRA",
    tensors={"V": Key("hra_u", write=lambda V: V.T, read=lambda u: u.T)},
    options={"r": "r"},
    unread=("init_weights",),
)
