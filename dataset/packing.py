"""Which sequences share a row: best-fit decreasing.

The longest sequence goes first; each goes into the row with the least room that still takes it (Johnson's best fit, as
used for language models by Ding et al., "Fewer Truncations Improve Language Modeling", 2024). No sequence is cut.
"""

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Rows of sequences.

    Args:
        lengths: positions that each sequence takes, int, 1 to capacity, shape (N,).
        capacity: positions of a row.
    Returns:
        the numbers of the sequences in each row; rows by their first (longest) sequence, in a fixed order.
    Raises:
        ValueError: a sequence is longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"sequences of 1 to {capacity} positions can be packed, not {lengths.min()} to {lengths.max()}"
        )
    rows: list[list[int]] = []
    # rows_with[room] are rows with so much room; bit `room` of `rooms` says that there are some. The lowest bit that is
    # set from `length` on is the best fit, found without a search.
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    order = np.argsort(-lengths, kind="stable")
    for number, length in zip(order.tolist(), lengths[order].tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
            rows[row].append(number)
        else:
            room, row = capacity, len(rows)
            rows.append([number])
        left = room - length
        if left:
            if not rows_with[left]:
                rooms |= 1 << left
            rows_with[left].append(row)
    return [np.array(row, np.int64) for row in rows]
