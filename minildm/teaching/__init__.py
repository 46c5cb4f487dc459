"""Synthetic training data with exact labels: the chest phantom, the procedural images, and programs that check both."""
