"""The command line of kvdb-cli: options, then one command, a pipe of commands, or a prompt.

Exit status: 0 fine, 1 a command was answered with an error, 2 wrong use or no connection.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvdb_tools.cli.connection import Target, Tls
from kvdb_tools.cli.run import Output, Runner

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

EXAMPLES = """\b
Examples:
  kvdb-cli PING
  kvdb-cli PREFILL agent TEXT "Once upon a time"
  kvdb-cli -x PREFILL agent TEXT < book.txt      # last argument from stdin
  kvdb-cli GENERATE agent MAXTOKENS 50 STREAM    # text appears as it is made
  kvdb-cli SNAPSHOT agent step:1
  kvdb-cli --json SNAPINFO step:1
  kvdb-cli < commands.txt                        # one command a line
  kvdb-cli                                       # prompt with hints, Tab completes

\b
Completion of the shell:
  eval "$(_KVDB_CLI_COMPLETE=bash_source kvdb-cli)"      (or zsh_source, fish_source)
"""


def _complete(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from kvdb_tools.cli.complete import complete_for_shell

    return complete_for_shell(context.params, incomplete)


@click.command(
    epilog=EXAMPLES,
    # Everything after the first word belongs to the command: `ZADD z -1 m` must not be read as an option.
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("-h", "--host", default="127.0.0.1", show_default=True, metavar="NAME", help="Server host.")
@click.option("-p", "--port", default=6374, show_default=True, type=click.IntRange(1, 65535), help="Server port.")
@click.option("-s", "--socket", "unixsocket", metavar="PATH", help="Unix socket (instead of host and port).")
@click.option("--user", metavar="NAME", help="ACL user.")
@click.option("-a", "--pass", "password", envvar="KVDBCLI_AUTH", metavar="TEXT", help="Password, or $KVDBCLI_AUTH.")
@click.option("-n", "--db", "database", default=0, type=click.IntRange(0), help="Database number.")
@click.option("--tls", is_flag=True, help="Use TLS.")
@click.option("--cacert", metavar="FILE", help="Certificates to trust, PEM (default: the system's).")
@click.option("--cert", metavar="FILE", help="The client's certificate, PEM.")
@click.option("--key", metavar="FILE", help="Its key, PEM.")
@click.option("--insecure", is_flag=True, help="With --tls: do not check the server's certificate.")
@click.option("-2", "protocol", flag_value=2, type=int, help="Speak RESP2 (no streaming, no progress).")
@click.option("-3", "protocol", flag_value=3, type=int, default=3, help="Speak RESP3 (default).")
@click.option("-x", "from_stdin", is_flag=True, help="Take the last argument from standard input.")
@click.option("--json", "as_json", is_flag=True, help="Replies, and streamed frames, as one line of JSON each.")
@click.option("--raw", "style", flag_value="raw", help="Plain bytes (default when not on a terminal).")
@click.option("--no-raw", "style", flag_value="people", help="Types and quotes also when not on a terminal.")
@click.option("-t", "timeout", type=float, metavar="SECONDS", help="Give up when the server is silent for so long.")
@click.version_option(package_name="kvdb")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, shell_complete=_complete)
def main(
    host: str,
    port: int,
    unixsocket: str | None,
    user: str | None,
    password: str | None,
    database: int,
    tls: bool,
    cacert: str | None,
    cert: str | None,
    key: str | None,
    insecure: bool,
    protocol: int,
    from_stdin: bool,
    as_json: bool,
    style: str | None,
    timeout: float | None,
    command: tuple[str, ...],
) -> None:
    """Talk to a kvdb server: one COMMAND, commands from a pipe, or a prompt."""
    wrap = Tls(cacert, cert, key, insecure) if tls else None
    target = Target(host, port, unixsocket, user, password, database, protocol, wrap)
    on_terminal = sys.stdout.isatty()
    # `streams`: a person waits and watches, so GENERATE is sent with STREAM.
    output = Output("json" if as_json else style or ("people" if on_terminal else "raw"), on_terminal and not as_json)
    runner = Runner(target, output, timeout)
    # Arguments that are not UTF-8 arrive as surrogates; this gives the very bytes that were typed.
    words = [word.encode("utf-8", "surrogateescape") for word in command]
    try:
        if from_stdin:
            if not words:
                raise click.UsageError("-x needs a command")
            status = runner.run([*words, sys.stdin.buffer.read()])
        elif words:
            status = runner.run(words)
        elif not sys.stdin.isatty():
            status = runner.run_lines(sys.stdin.buffer)
        else:
            from kvdb_tools.cli.prompt import run_prompt

            status = run_prompt(runner, Path.home() / ".kvdbcli_history")
    except ConnectionError as error:
        click.echo(f"Could not talk to kvdb at {target}: {error}", err=True)
        status = 2
    except OSError as error:
        click.echo(f"Could not connect to kvdb at {target}: {error}", err=True)
        status = 2
    except KeyboardInterrupt:
        status = 130
    finally:
        runner.close()
    raise SystemExit(status)
