"""What images are read from: folders, archives, tables, the reference's layout."""
