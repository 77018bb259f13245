"""Measurements of the kernels: cases, the runner, tables from records, launch-table sweeps."""

import sys
from pathlib import Path

# A checkout measures itself, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
