"""Coverage-guided fuzzing of what a hostile clone can send: see ``make fuzz``."""
