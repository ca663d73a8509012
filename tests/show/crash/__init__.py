"""Parts of crash_loop.py: what must be true after a crash, and the clients that the crash interrupts."""
