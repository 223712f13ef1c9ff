"""Adapter algebra: snapshots, their sums attached as adapters, routes between phases, gains by group, TIES and DARE."""
