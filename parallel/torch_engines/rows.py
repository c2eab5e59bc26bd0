"""The rows of a parameter that each rank holds, as FSDP2 and torch.chunk cut: all have as many as the first one, except
the last ones, which may have fewer or none."""


def most_rows(ranks: int, rows: int) -> int:
    """Number of the first rank's rows."""
    return -(-rows // ranks)


def rows_of(rank: int, ranks: int, rows: int) -> range:
    """Numbers of a rank's rows."""
    most = most_rows(ranks, rows)
    return range(min(rank * most, rows), min((rank + 1) * most, rows))
