"""Files of others: one reader for each format, each of whose failures is one line."""
