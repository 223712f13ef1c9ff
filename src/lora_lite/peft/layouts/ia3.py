"""PEFT's type IA3, layers outside feedforward_modules: the stored factor of the output is 1 + g."""

from ..layout import Key, Layout, Options
from ..selecting import listed


def feedforward(options: Options, path: str) -> bool:
    """PEFT's rule; unlike target_modules the end of the path need not begin at a dot."""
    names = options.get("feedforward_modules")
    if isinstance(names, str):
        return listed(names, path)
    return any(path.endswith(name) for name in names or ())


LAYOUT = Layout(
    peft_type="IA3",
    tensors={"g": Key("ia3_l", write=lambda g: 1 + g[:, None], read=lambda l: l - 1)},
    unread=("init_ia3_weights", "feedforward_modules"),
    conv1d=True,
    derived=lambda adapter: {"feedforward_modules": []},
    covers=lambda options, path: not feedforward(options, path),
)
