"""`fastrepa watch`: a run in a browser while it goes on, and samples of it when it does not."""
