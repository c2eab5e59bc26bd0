"""Adapters: small trained additions to a model whose own weights stay as they are."""
