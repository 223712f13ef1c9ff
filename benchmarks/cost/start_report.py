"""What the rows of `cost_start` say, as lines of Markdown. Figures come from the rows alone."""

from typing import Any

NAMES = {
    "peft": "PEFT's `get_peft_model`",
    "load_file": "`safetensors.torch.load_file`, which maps the file",
    "load_file_and_copy": "the same and a copy of every tensor",
    "read_bytes": "`Path.read_bytes` of the file",
}
WORDS = {"import": "`import lora_lite` after torch", "attach": "`ll.attach` of lora", "save": "`ll.save`", "load": "`ll.load`"}


def milliseconds(spread: dict[str, float]) -> str:
    return f"{1e3 * spread['median']:.0f} ms ({1e3 * spread['low']:.0f} to {1e3 * spread['high']:.0f})"


def start_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table: median and quartiles of ours and of what stands beside it, and the ratio of the medians."""
    size = next((f"{row['file_bytes'] / 1e6:.0f} MB" for row in rows if "file_bytes" in row), "-")
    layers = next((row["layers"] for row in rows if "layers" in row), 0)
    lines = [
        f"Rank 16 on {layers} layers with the shapes of Qwen3-0.6B, a file of {size}, page cache warm.",
        "",
        "| what | ours | beside | takes | ours / beside |",
        "|---|--:|---|--:|--:|",
    ]
    for row in rows:
        ours, others = row["ours"], {who: row[who] for who in NAMES if who in row}
        first = f"| {WORDS[row['measure']]} | {milliseconds(ours)} |"
        if not others:
            lines.append(f"{first} - | - | - |")
        for who, found in others.items():
            lines.append(f"{first} {NAMES[who]} | {milliseconds(found)} | {ours['median'] / found['median']:.2f} |")
            first = "| | |"
    return lines
