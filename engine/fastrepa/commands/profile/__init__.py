"""`fastrepa profile`: where a step's time goes."""
