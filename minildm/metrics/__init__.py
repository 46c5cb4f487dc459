"""Metrics: FID and what a small test set can honestly say."""
