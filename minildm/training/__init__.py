"""Training: the optimizer, one step, the loop, a run's folder."""
