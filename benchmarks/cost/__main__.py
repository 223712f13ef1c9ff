"""python -m benchmarks.cost: what `just bench-cost` calls; Ctrl-C ends it quietly at any moment."""

import sys

try:
    from benchmarks.cost.bench import main

    main(sys.argv[1:])
except KeyboardInterrupt:
    print("stopped; nothing was written")
    sys.exit(130)
