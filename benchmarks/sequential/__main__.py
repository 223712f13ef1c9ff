"""python -m benchmarks.sequential: what `just bench-sequential` calls; Ctrl-C ends it quietly at any moment."""

import sys

try:
    from benchmarks.sequential.bench import main

    main(sys.argv[1:])
except KeyboardInterrupt:
    print("stopped; nothing was written")
    sys.exit(130)
