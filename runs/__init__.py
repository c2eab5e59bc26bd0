"""The run directory: its files and what they say. Nothing here needs torch."""
