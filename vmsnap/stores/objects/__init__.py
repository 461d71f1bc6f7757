"""Places where packs live."""
