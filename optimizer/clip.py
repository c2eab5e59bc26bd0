"""Gradient clipping by the global norm, which `sum_of_squares` of parallel/buffer.py adds up in float64."""


def clip_factor(grad_norm: float, max_norm: float) -> float:
    """Factor that brings the gradients' norm down to at most max_norm; 1 if max_norm is 0 (no clipping)."""
    return min(1.0, max_norm / grad_norm) if max_norm > 0.0 and grad_norm > 0.0 else 1.0
