"""Steps as torch.profiler sees them, and what their operations cost."""
