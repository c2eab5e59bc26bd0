"""Checkpoints: written in the background, whole or not there, found again and read."""
