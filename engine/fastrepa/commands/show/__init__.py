"""`fastrepa data show`: a set's images and columns as a picture."""
