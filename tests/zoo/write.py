"""python -m tests.zoo.write: expected.md anew, from what the library does. Review the difference before it is committed.

Entries of models whose library is not installed stay as they are (pip install diffusers timm).
"""

from .entry import FILE, entry, page, read
from .models import ZOO

if __name__ == "__main__":
    known = read()
    FILE.write_text(page({name: entry(name) if row.here else known[name] for name, row in ZOO.items()}))
    print(f"{FILE}: {len(ZOO)} architectures. What changed: git diff {FILE}")
