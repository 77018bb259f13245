"""`fastrepa plan`: memory and time, before a GPU is there."""
