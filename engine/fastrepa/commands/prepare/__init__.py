"""`fastrepa prepare`: a source becomes a set."""
