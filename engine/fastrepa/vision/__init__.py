"""The frozen visual encoders whose patch features the generator is aligned to."""
