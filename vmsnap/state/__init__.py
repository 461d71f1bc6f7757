"""Run journal, locks and the book of environments."""
