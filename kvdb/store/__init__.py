"""The store: segments, the index, and the one thread that commits. It knows layouts and bytes, never tensors."""

from kvdb.store.store import Store

__all__ = ["Store"]
