"""`fastrepa bench`: the step against its rivals."""
