"""TOML files to model values."""
