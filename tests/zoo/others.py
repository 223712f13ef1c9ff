"""Models of diffusers and timm, for whoever has them: `just test-long` runs their rows where the library is installed."""

import importlib
from typing import Any

from torch import nn

from .row import TorchRow

UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32, "attention_head_dim": 4, "norm_num_groups": 8,
}  # fmt: skip
DIT = {
    "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8, "patch_size": 2,
    "num_embeds_ada_norm": 10, "norm_num_groups": 4,
}  # fmt: skip
FLUX = {
    "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
TIMM_VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
TIMM_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 5, "ls_init_value": 1.0}


class OtherRow(TorchRow):
    """A class of another library, built from keywords; the first part of its place is the library."""

    def __init__(self, name: str, place: str, batch: str, sizes: dict[str, Any]):
        super().__init__(name, self.construct, batch)
        self.needs, self.place, self.sizes = place.partition(".")[0], place, sizes

    def construct(self) -> nn.Module:
        module, _, cls = self.place.rpartition(".")
        return getattr(importlib.import_module(module), cls)(**self.sizes)


OTHERS = [
    OtherRow("diffusers_unet", "diffusers.UNet2DConditionModel", "noisy with text", UNET),
    OtherRow("diffusers_dit", "diffusers.DiTTransformer2DModel", "noisy with class", DIT),
    OtherRow("diffusers_flux", "diffusers.FluxTransformer2DModel", "packed with text", FLUX),
    OtherRow("timm_vit", "timm.models.VisionTransformer", "x", TIMM_VIT),
    OtherRow("timm_convnext", "timm.models.ConvNeXt", "x", TIMM_CONVNEXT),
]
