"""Reports on runs, and comparisons of methods."""
