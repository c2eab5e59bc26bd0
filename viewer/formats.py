"""Numbers as text: durations, values, places on the x axis."""

import math
import time


def duration(seconds: float) -> str:
    """A duration for a reader, for example 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if not math.isfinite(seconds):
        return "?"
    sign, seconds = ("-" if seconds < 0 else ""), abs(seconds)
    if seconds < 60:
        return f"{sign}{seconds:.3g} s"
    minutes = round(seconds / 60) if seconds >= 600 else seconds / 60
    if minutes < 60:
        return f"{sign}{round(minutes, 1):g} min"
    parts = [(int(minutes // 1440), "d"), (int(minutes % 1440 // 60), "h"), (int(minutes % 60), "min")]
    first = next(index for index, (count, _) in enumerate(parts) if count)
    return sign + " ".join(f"{count} {name}" for count, name in parts[first : first + 2] if count)


def value_text(value: float) -> str:
    """A measured value beside the cursor."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.5g}"


def x_text(value: float, x: str) -> str:
    """A place on the x axis beside the cursor."""
    if x == "time":
        return duration(value)
    if x == "clock":
        try:
            return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value * 86400))
        except (ValueError, OverflowError, OSError):
            return "?"
    return f"{x} {value:,.0f}"
