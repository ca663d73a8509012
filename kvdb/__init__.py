"""kvdb: a persistent database service for the live state of language models."""

__version__ = "0.1.0"
