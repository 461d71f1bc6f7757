"""The demonstration: the main job on a real guest, from nothing to a report."""
