"""Ways to run a command in a guest."""
