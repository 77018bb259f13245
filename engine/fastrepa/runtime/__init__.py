"""The parts that every process needs, whatever it does: its life, its files, the machine."""
