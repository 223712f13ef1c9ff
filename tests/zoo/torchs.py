"""torch's own transformers, whose attention reads the weights of its output projection without calling it."""

from torch import Tensor, nn

from .row import TorchRow


class Block(nn.Module):
    """Attention and a feed-forward net, each behind a norm, as people write it by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))

    def forward(self, src: Tensor) -> Tensor:
        z = self.norm1(src)
        src = src + self.attention(z, z, z, need_weights=False)[0]
        return src + self.mlp(self.norm2(src))


class Recurrent(nn.Module):
    """An LSTM, which keeps its matrices as plain parameters, and a Linear on its output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 24, num_layers=2, batch_first=True)
        self.out = nn.Linear(24, 8)

    def forward(self, src: Tensor) -> Tensor:
        return self.out(self.lstm(src)[0])


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2, enable_nested_tensor=False)


def transformer() -> nn.Module:
    return nn.Transformer(32, 4, 2, 2, 48, batch_first=True)


TORCH = [
    TorchRow("torch_encoder", encoder, "vectors"),
    TorchRow("torch_transformer", transformer, "two vectors"),
    TorchRow("torch_attention_block", lambda: nn.Sequential(Block(), Block()), "input"),
    TorchRow("torch_lstm", Recurrent, "vectors"),
]
