"""A room per command; none imports another, and nothing but the command line imports them."""
