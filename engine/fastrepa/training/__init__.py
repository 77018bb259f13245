"""One training step and everything that keeps a run alive."""
