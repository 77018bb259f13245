"""`fastrepa report`: runs as one page."""
