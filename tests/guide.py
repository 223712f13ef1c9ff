"""The Python blocks of a page under docs/guide, so that its test runs what the reader sees."""

import re
from pathlib import Path

GUIDE = Path(__file__).parent.parent / "docs" / "guide"


def blocks(page: str) -> list[str]:
    """The fenced python blocks of docs/guide/<page>.md, in order."""
    return re.findall(r"```python\n(.*?)```", (GUIDE / f"{page}.md").read_text(), re.DOTALL)
