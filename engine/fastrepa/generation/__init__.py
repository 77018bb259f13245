"""Samplers and image generation from a run."""
