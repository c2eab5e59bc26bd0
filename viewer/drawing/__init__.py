"""Pictures of runs, by matplotlib, with or without a desktop."""
