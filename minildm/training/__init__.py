"""Training: the loop, its tasks, the settings and folder of a run."""
