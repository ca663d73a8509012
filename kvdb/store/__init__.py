"""The store: segments, the index, and the one thread that commits. It knows layouts and bytes, never tensors.

The daemon uses `kvdb.store.store.Store`.
"""
