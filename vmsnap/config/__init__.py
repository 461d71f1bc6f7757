"""Configuration files: read, checked, and turned into model values."""
