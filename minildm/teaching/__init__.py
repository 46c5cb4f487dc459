"""What teaches: the chest phantom and its ruler, the procedural images and their checker. Imports nothing of data/."""
