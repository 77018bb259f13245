"""The files that travel with exported weights: torch and diffusers alone, nothing of ours."""
