"""A run's state on disk, as logical tensors."""
