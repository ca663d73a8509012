"""Sockets, clients and what they have said and heard so far."""
