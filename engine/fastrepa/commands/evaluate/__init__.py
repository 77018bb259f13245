"""`fastrepa evaluate`: generated images against real ones."""
