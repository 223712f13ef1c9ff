"""PEFT's type LORA. Starts that rewrite the base weight leave a folder that only means something beside that weight."""

from ..layout import Key, Layout

STARTS = (True, *"gaussian orthogonal eva".split())

LAYOUT = Layout(
    peft_type="LORA",
    tensors={"A": Key("lora_A.weight"), "B": Key("lora_B.weight")},
    when={"use_dora": False},
    options={"r": "r", "alpha": "lora_alpha", "rslora": "use_rslora"},
    patterns=True,
    unread=("qalora_group_size", "eva_config", "megatron_core"),
    allowed={"init_lora_weights": STARTS},
    scaled="B",
    conv1d=True,
)
