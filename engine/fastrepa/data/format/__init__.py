"""A prepared set on disk: shards, their index, columns, and the reference's layout."""
