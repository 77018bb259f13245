"""`fastrepa doctor`: what this machine can do, and what would enable the rest."""

from fastrepa.commands.doctor.examine import print_doctor

__all__ = ["print_doctor"]
