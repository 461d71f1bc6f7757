"""Database knowledge without input or output: which command, and what its output means."""
