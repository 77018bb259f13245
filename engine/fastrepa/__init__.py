"""fastrepa: a training engine for representation-aligned diffusion transformers (REPA)."""

__version__ = "0.1.0"
