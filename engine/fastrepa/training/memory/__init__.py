"""Memory of a rank, by arithmetic: what a run will hold, and what is chosen so that it fits."""
