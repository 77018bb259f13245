"""Ours, whatever else is installed: torch-fidelity's wheel brings a package of this name."""
