"""The command line of kvdb-dump: one subcommand a file."""

from __future__ import annotations

import click

from kvdb_tools.dump.kv import kv
from kvdb_tools.dump.ls import ls
from kvdb_tools.dump.record import record
from kvdb_tools.dump.show import show
from kvdb_tools.dump.tree import tree


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Look at a kvdb data directory, live or not, or at a ds4 .kv file.

    Nothing is changed, and neither a daemon nor a model is needed. Exit status: 0 fine, 1 damage met, 2 wrong use.
    """


main.add_command(ls)
main.add_command(tree)
main.add_command(show)
main.add_command(record)
main.add_command(kv)
