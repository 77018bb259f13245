"""The generator: SiT with projectors, and its state-dict formats."""
