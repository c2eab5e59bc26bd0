"""Limits of what is in memory at once. A test may lower them; readers ask for them when they need them."""

LONGEST_PART = 1 << 20
"""Characters; a longer document comes in several parts."""
LONGEST_RECORD = 1 << 26
"""Bytes of a line or of a Parquet row, characters of an array's element or of a table's row. A record is in memory as a
whole, several times over; a longer one is refused."""
BUFFER_BYTES = 1 << 20
"""Bytes that a file is read by."""
