"""What a workflow needs from the world, as protocols."""
