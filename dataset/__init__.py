"""Token files, their order, and the batches made from them."""
