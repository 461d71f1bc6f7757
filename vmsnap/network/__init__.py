"""The fence around a clone, and giving a clone an address."""
