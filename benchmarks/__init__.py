"""Measurements: cases, the runner, tables from records, launch-table sweeps, the kit for a GPU."""

import sys
from pathlib import Path

# A checkout measures itself, installed or not.
SOURCES = [str(Path(__file__).resolve().parents[1] / name) for name in ("engine", "kernels")]
sys.path[:0] = SOURCES
