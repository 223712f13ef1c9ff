"""One file per method. Each registers itself; no other source file names one."""
