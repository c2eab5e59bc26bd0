"""What is trained: each task turns a batch into (loss_sum, count, metrics)."""
