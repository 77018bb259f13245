"""`fastrepa convert`: weights and optimiser states to and from others' formats."""
