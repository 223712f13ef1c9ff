"""python -m benchmarks NAME [key=value ...]: what `just bench-variant` calls; Ctrl-C ends it quietly at any moment."""

import sys

try:
    import typer

    from benchmarks.embedded.bench import main

    typer.run(main)
except KeyboardInterrupt:
    print("stopped; nothing was written")
    sys.exit(130)
