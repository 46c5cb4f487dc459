"""One file per data set: ``records(root)`` reads a publisher's layout; ``PROMPT`` is its prompt template."""
