"""Packing of sequences into rows: best-fit decreasing.

Sequences are placed from the longest to the shortest, each into the row with the least room that still takes it
(Johnson's best fit, as used for language models by Ding et al., "Fewer Truncations Improve Language Modeling", 2024).
No sequence is cut.
"""

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Rows, each as the numbers of its sequences.

    Args:
        lengths: positions that each sequence takes, int, 1 to capacity, shape (N,).
        capacity: positions of a row.
    Returns:
        rows in the order of their first sequence, which is the longest of the row.
    Raises:
        ValueError: a sequence is longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"sequences of 1 to {capacity} positions can be packed, not {lengths.min()} to {lengths.max()}"
        )
    rows: list[list[int]] = []
    # rows_with[room] are the rows with that much room; bit `room` of `rooms` says that there are some. The lowest set
    # bit from `length` on is the best fit, found without a search.
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
