"""Fused operations for representation-aligned diffusion transformers. Depends on torch and triton only."""
