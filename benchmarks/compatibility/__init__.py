"""just compatibility: every variant through merge, export, quantised bases, compile, two processes; docs/compatibility.md."""
