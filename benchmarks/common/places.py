"""Where the benchmarks keep things: small pretrained models, under the addresses that records name; records; runs of today."""

from pathlib import Path

HOME = Path(__file__).parents[1]
ROOT = HOME.parent
BASE = HOME / "base"  # the embedded language model
FORECASTER = HOME / "forecast_base"
TIER = HOME / "tier"  # the model of bench-sequential's quick tier
RESULTS = HOME / "results"
SWEEP = RESULTS / "sweep"
RUNS = HOME / "runs"
