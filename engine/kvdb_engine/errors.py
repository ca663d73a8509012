"""Errors of the engine package.

ModelError      a model's files cannot be used: the message names the file (or tensor) and what to do about it
StateError      a stored state cannot be turned into a live one
TokenError      a token id is outside the vocabulary
ContextFullError  more tokens than the context
"""


class ModelError(ValueError):
    """A model's files are missing, damaged or of another architecture."""


class StateError(ValueError):
    """Stored pages and tail do not fit together or do not fit the model."""


class TokenError(ValueError):
    """A token id is outside the vocabulary."""


class ContextFullError(ValueError):
    """More tokens than the model's context; the daemon answers TOOLONG."""
