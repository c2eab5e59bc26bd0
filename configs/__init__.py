"""Configurations for train_my_ddp.py, and the sizes of its --size."""
