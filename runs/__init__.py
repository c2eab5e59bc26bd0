"""The run directory: its layout (layout.py), and readers and writers of its files. Nothing here needs torch."""
