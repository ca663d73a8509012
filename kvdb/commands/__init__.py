"""The commands: one declarative table, one module of handlers for each group."""
