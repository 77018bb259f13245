"""DeepSpeed's ZeRO as the trainer uses it."""
