"""Sources of images: folders, archives, tables, the reference's layout."""
