"""`python -m kvdb` is kvdb-server."""

from kvdb.server import main

main()
