"""Bytes only: the formats kvdb speaks and stores. No I/O, nothing imported from the other packages."""
