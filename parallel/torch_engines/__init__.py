"""Engines of torch.distributed behind the interface of parallel/engine.py."""
