"""Pages about runs, for a browser: what `report` writes and `watch` serves."""
