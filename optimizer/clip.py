"""The global gradient norm, in float64 (see `sum_of_squares`), and what it does to the gradients."""


def clip_factor(grad_norm: float, max_norm: float) -> float:
    """What gradients are multiplied by so that their norm is at most max_norm; 1 if max_norm is 0 (no clipping)."""
    return min(1.0, max_norm / grad_norm) if max_norm > 0.0 and grad_norm > 0.0 else 1.0
