"""Limits on what is held in memory at once. Readers look them up when they need them, so that a test can lower them."""

LONGEST_PART = 1 << 20
"""Characters in a part of a document; a longer document comes in several parts."""
LONGEST_RECORD = 1 << 26
"""Size of the longest record that is read: bytes of a line or of a Parquet row, characters of an array's element or of
a table's row. A record is held in memory as a whole, several times over."""
BUFFER_BYTES = 1 << 20
"""Bytes that are read from a file at once."""
