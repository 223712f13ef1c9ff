"""python -m tests.zoo.write: expected.md anew, from what the library does. Review the difference before it is committed."""

from .entry import FILE, entry, page
from .models import ZOO

if __name__ == "__main__":
    FILE.write_text(page({name: entry(name) for name in ZOO}))
    print(f"{FILE}: {len(ZOO)} architectures. What changed: git diff {FILE}")
