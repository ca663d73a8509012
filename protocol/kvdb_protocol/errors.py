"""Errors of the byte formats.

FormatError            the bytes are not what the format says
├── ChecksumError      they were, and have changed since (crc32c)
└── VersionError       a newer or unknown version of a known format
"""


class FormatError(ValueError):
    """The bytes do not follow the format; the message names the field and both values."""


class ChecksumError(FormatError):
    """A checksum does not match: torn write, bit flip or truncation."""


class VersionError(FormatError):
    """The format is known, this version of it is not."""
