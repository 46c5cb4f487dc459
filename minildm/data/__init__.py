"""Images, prompts and data sets: from a publisher's folder to training pairs."""
