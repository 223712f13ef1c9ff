"""The user guide's own code: tests run the very blocks that the pages show."""

import re

from tests import ROOT

GUIDE = ROOT / "docs" / "guide"
LONGEST = 15


def sections(page: str) -> dict[str, list[str]]:
    """{heading: its ```python blocks} of docs/guide/PAGE.md, in order; each block is shorter than LONGEST lines."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^#+ ", (GUIDE / f"{page}.md").read_text(), flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        found[heading] = re.findall(r"^```python\n(.*?)^```", body, flags=re.MULTILINE | re.DOTALL)
        assert all(len(block.splitlines()) < LONGEST for block in found[heading]), f"{page}, {heading}: a long block"
    return {heading: blocks for heading, blocks in found.items() if blocks}


def blocks(page: str) -> list[str]:
    """Every ```python block of docs/guide/PAGE.md, in order."""
    return [block for of in sections(page).values() for block in of]
