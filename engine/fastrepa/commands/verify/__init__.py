"""`fastrepa data verify`: is a set whole?"""
