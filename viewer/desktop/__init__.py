"""The viewer as a desktop window."""
