"""just bench-cost: time and memory beside the bare model, PEFT and what the arithmetic allows; docs/cost.md.

bench    the command, and steps     attach, attach_report  attaching and its growth    start, start_report  import, save, load
limit    what cannot be beaten      peers   PEFT's configs                               goals   the figures that were asked for
report   table, plot and page       objectives   just bench-objectives
"""
