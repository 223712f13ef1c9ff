"""python -m benchmarks.steering: what `just steering` calls; Ctrl-C ends it quietly at any moment."""

import sys

try:
    from benchmarks.steering.bench import main

    main(sys.argv[1:])
except KeyboardInterrupt:
    print("stopped; nothing was written")
    sys.exit(130)
