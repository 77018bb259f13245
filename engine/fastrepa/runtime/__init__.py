"""Needed by every process, whatever it does: its life, its files, the machine."""
