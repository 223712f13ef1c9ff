"""python -m benchmarks.compatibility: what `just compatibility` calls; Ctrl-C ends it quietly at any moment."""

import sys

try:
    from benchmarks.compatibility.bench import main

    main(sys.argv[1:])
except KeyboardInterrupt:
    print("stopped; nothing was written")
    sys.exit(130)
