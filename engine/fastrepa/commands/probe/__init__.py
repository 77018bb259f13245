"""`fastrepa probe`: what encoders and a generator's blocks know."""
