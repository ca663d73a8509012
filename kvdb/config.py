"""Configuration: every name, its kind, default and help, in one table; reading files and options; CONFIG GET/SET.

A value is kept typed and is written and shown as text in the form a configuration file has. Redis' names keep Redis'
meaning and spelling, so that clients and tools that ask for them find what they expect.
Invariant: a Config holds only valid values; a change that is not valid changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from kvdb.errors import KvdbError
from kvdb_protocol.requests import split_inline

Value = str | int | bool | tuple[str, ...]

_UNITS = {"": 1, "b": 1, "k": 1000, "kb": 1 << 10, "m": 10**6, "mb": 1 << 20, "g": 10**9, "gb": 1 << 30}
_UNITS |= {"t": 10**12, "tb": 1 << 40}
POLICIES = (
    "noeviction",
    *(f"{scope}-{order}" for scope in ("volatile", "allkeys") for order in ("lru", "lfu", "ttl", "value")),
)
LOG_LEVELS = ("debug", "verbose", "notice", "warning", "nothing")
_EVENT_LETTERS = "KEg$lshzxetdmnA"


class ConfigError(KvdbError):
    """A name that does not exist, or a value that its name does not take."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One name. kind: text, int, bytes, seconds, bool, choice, words, events. live: CONFIG SET may change it."""

    name: str
    kind: str
    default: Value
    help: str
    live: bool = True
    low: int = 0
    high: int = (1 << 63) - 1
    choices: tuple[str, ...] = ()
    repeats: bool = False
    secret: bool = False

    def parse(self, words: list[str]) -> Value:
        """The value that these words of a file, an option or CONFIG SET mean. Raises ConfigError."""
        if self.kind in ("words", "limits"):
            return tuple(word for text in words for word in text.split())
        if len(words) != 1:
            raise ConfigError(f"'{self.name}' takes one value")
        text = words[0]
        if self.kind in ("int", "seconds", "bytes"):
            return self._number(text)
        if self.kind == "bool":
            if text.lower() not in ("yes", "no"):
                raise ConfigError("argument must be 'yes' or 'no'")
            return text.lower() == "yes"
        if self.kind == "choice":
            if text.lower() not in self.choices:
                raise ConfigError(f"argument(s) must be one of the following: {', '.join(self.choices)}")
            return text.lower()
        if self.kind == "events" and set(text) - set(_EVENT_LETTERS):
            raise ConfigError("Invalid event class character. Use 'Ag$lshzxeKEtmdn'.")
        return text

    def _number(self, text: str) -> int:
        match = re.fullmatch(r"(-?\d{1,19})([a-z]*)", text.lower())
        unit = _UNITS.get(match[2]) if match else None
        if match is None or unit is None or (unit != 1 and self.kind != "bytes"):
            if self.kind == "bytes":
                raise ConfigError("argument must be a memory value")
            raise ConfigError("argument couldn't be parsed into an integer")
        value = int(match[1]) * unit
        if not self.low <= value <= self.high:
            raise ConfigError(f"argument must be between {self.low} and {self.high} inclusive")
        return value

    def show(self, value: Value) -> str:
        """The value as text, as CONFIG GET answers it."""
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, tuple):
            return " ".join(value)
        return str(value)


def _p(name: str, kind: str, default: Value, text: str, *, live: bool = True, **more: object) -> Parameter:
    return Parameter(name, kind, default, text, live, **more)  # type: ignore[arg-type]


PARAMETERS: dict[str, Parameter] = {
    p.name: p
    for p in (
        # where and how to listen
        _p("dir", "text", "./", "data directory; it is made if it does not exist", live=False),
        _p("port", "int", 6374, "TCP port, 0 for none", live=False, high=65535),
        _p("bind", "words", ("127.0.0.1", "-::1"), "addresses; one with a leading - may fail", live=False),
        _p("unixsocket", "text", "", "path of a unix socket", live=False),
        _p("unixsocketperm", "text", "", "its permissions, octal", live=False),
        _p("http-port", "int", 0, "HTTP port (8374 by custom), 0 for none", live=False, high=65535),
        _p("protected-mode", "bool", True, "refuse other machines while there is no password"),
        _p("tcp-backlog", "int", 511, "connections the system may queue", live=False),
        _p("tcp-keepalive", "seconds", 300, "seconds between probes of another machine that is silent, 0 for none"),
        _p("timeout", "seconds", 0, "close a connection that is idle for so many seconds, 0 for never"),
        _p("maxclients", "int", 10000, "connections at most", low=1, high=1_000_000),
        _p("proto-max-bulk-len", "bytes", 512 << 20, "largest value a client may send", low=1 << 20),
        _p("client-query-buffer-limit", "bytes", 1 << 30, "largest unfinished request", low=1 << 20),
        _p(
            "client-output-buffer-limit",
            "limits",
            ("normal", "0", "0", "0", "replica", "268435456", "67108864", "60", "pubsub", "33554432", "8388608", "60"),
            "class, hard limit, soft limit, seconds: a client whose waiting output is larger is closed",
        ),
        _p("databases", "int", 16, "number of databases", live=False, low=1, high=16),
        # who may do what
        _p("requirepass", "text", "", "password of the default user", secret=True),
        _p("aclfile", "text", "", "file of users", live=False),
        _p("acllog-max-len", "int", 128, "entries kept by ACL LOG"),
        _p("acl-pubsub-default", "choice", "resetchannels", "channels of new users",
           choices=("allchannels", "resetchannels")),
        _p("enable-debug-command", "choice", "no", "who may use DEBUG", live=False, choices=("no", "yes", "local")),
        _p("tls-port", "int", 0, "TLS port, 0 for none", live=False, high=65535),
        _p("http-tls-port", "int", 0, "HTTPS port, 0 for none", live=False, high=65535),
        _p("tls-cert-file", "text", "", "certificate of the server, PEM", live=False),
        _p("tls-key-file", "text", "", "its key, PEM", live=False),
        _p("tls-key-file-pass", "text", "", "password of the key", live=False, secret=True),
        _p("tls-ca-cert-file", "text", "", "certificates that sign the clients' ones, PEM", live=False),
        _p("tls-ca-cert-dir", "text", "", "a folder of them", live=False),
        _p("tls-auth-clients", "choice", "yes", "ask for client certificates", live=False,
           choices=("yes", "no", "optional")),
        # durability and space
        _p("appendfsync", "choice", "everysec", "when writes become durable (no: every 5 s)",
           choices=("always", "everysec", "no")),
        _p("save", "text", "", "accepted for clients that ask; writes are always on disk within appendfsync"),
        _p("appendonly", "bool", True, "accepted for clients that ask; always on", live=False),
        _p("maxstore", "bytes", 0, "bytes the store may take on disk, 0 for no limit"),
        _p("maxstore-policy", "choice", "noeviction", "what to evict when maxstore is reached", choices=POLICIES),
        _p("maxmemory", "bytes", 0, "accepted for clients that ask; see maxstore"),
        _p("maxmemory-policy", "choice", "noeviction", "accepted for clients that ask; see maxstore-policy", choices=(
            "noeviction", "allkeys-lru", "allkeys-lfu", "allkeys-random",
            "volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl",
        )),
        _p("transfer-dir", "text", "", "folder of STORE EXPORT, IMPORT and BACKUP; empty: DIR/transfer", live=False),
        # models
        _p("model", "words", ("dsv4-nano",), "built-in name, path, or NAME=PATH; repeats", live=False, repeats=True),
        _p("cross-quant", "choice", "allow", "share states across quantisations", choices=("allow", "deny")),
        _p("engine-idle-timeout", "seconds", 600, "end an engine that is idle for so many seconds, 0 for never"),
        _p("engine-cache-bytes", "bytes", 1 << 30, "bytes of live states an engine may keep"),
        _p("engine-queue-limit", "int", 1000, "requests that may wait for an engine; more are answered BUSY", low=1),
        _p("engine-hang-timeout", "seconds", 300, "kill an engine that is silent for so long under work, 0 for never"),
        # looking
        _p("notify-keyspace-events", "events", "", "classes of keyspace events to publish"),
        _p("slowlog-log-slower-than", "int", 10000, "microseconds; negative for none", low=-1),
        _p("slowlog-max-len", "int", 128, "entries kept by SLOWLOG"),
        _p("latency-monitor-threshold", "int", 0, "milliseconds, 0 for none"),
        _p("loglevel", "choice", "notice", "what to log", choices=LOG_LEVELS),
        _p("logfile", "text", "", "file of the log, standard output if empty", live=False),
        _p("hz", "int", 10, "background rounds a second", low=1, high=500),
        # thresholds that OBJECT ENCODING reports by
        _p("hash-max-listpack-entries", "int", 128, "a hash with more fields is called hashtable"),
        _p("hash-max-listpack-value", "bytes", 64, "or with a longer field or value"),
        _p("zset-max-listpack-entries", "int", 128, "a sorted set with more members is called skiplist"),
        _p("zset-max-listpack-value", "bytes", 64, "or with a longer member"),
    )
}  # fmt: skip

Apply = Callable[["Config", frozenset[str]], None]


class Config:
    """The values in force. `file` is the configuration file they were read from, if any."""

    def __init__(self, values: Mapping[str, Value] | None = None, file: Path | None = None) -> None:
        self._values: dict[str, Value] = {name: p.default for name, p in PARAMETERS.items()}
        self._values.update(values or {})
        self.file = file
        self.listeners: list[Apply] = []

    def text(self, name: str) -> str:
        """A text, choice or events value."""
        return str(self._values[name])

    def number(self, name: str) -> int:
        """An int, bytes or seconds value."""
        value = self._values[name]
        assert isinstance(value, int)
        return value

    def flag(self, name: str) -> bool:
        """A bool value."""
        return self._values[name] is True

    def words(self, name: str) -> tuple[str, ...]:
        """A words value."""
        value = self._values[name]
        assert isinstance(value, tuple)
        return value

    def show(self, name: str) -> str:
        """Any value as text."""
        return PARAMETERS[name].show(self._values[name])

    def is_default(self, name: str) -> bool:
        """Whether the value is the default one."""
        return self._values[name] == PARAMETERS[name].default

    def matching(self, patterns: Iterable[str]) -> dict[str, str]:
        """Names and values that match any of the glob patterns."""
        lowered = [pattern.lower() for pattern in patterns]
        return {name: self.show(name) for name in PARAMETERS if any(fnmatchcase(name, glob) for glob in lowered)}

    def set(self, pairs: Iterable[tuple[str, str]]) -> None:
        """CONFIG SET: all or none. Listeners are told the changed names; one that raises undoes the change."""
        changes: dict[str, Value] = {}
        for name, text in pairs:
            parameter = PARAMETERS.get(name.lower())
            if parameter is None:
                raise ConfigError(f"Unknown option or number of arguments for CONFIG SET - '{name}'")
            prefix = f"CONFIG SET failed (possibly related to argument '{name}') - "
            if not parameter.live:
                raise ConfigError(f"{prefix}can't set immutable config")
            if parameter.name in changes:
                raise ConfigError(f"{prefix}duplicate parameter")
            try:
                changes[parameter.name] = self._merge(parameter, parameter.parse([text]))
            except ConfigError as error:
                raise ConfigError(f"{prefix}{error}") from None
        before = {name: self._values[name] for name in changes}
        self._values.update(changes)
        try:
            for listener in self.listeners:
                listener(self, frozenset(changes))
        except Exception:
            self._values.update(before)
            raise

    def _merge(self, parameter: Parameter, value: Value) -> Value:
        """client-output-buffer-limit names classes: those it does not name keep their limits."""
        if parameter.kind != "limits":
            return value
        assert isinstance(value, tuple)
        return merge_limits(self.words(parameter.name), value)

    def lines(self) -> dict[str, str]:
        """The configuration lines of all values that are not the default, by name (CONFIG REWRITE)."""
        changed = [name for name in PARAMETERS if not self.is_default(name)]
        return {name: f"{name} {_quoted(PARAMETERS[name], self._values[name])}" for name in changed}


def merge_limits(old: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
    """Replace the classes of client-output-buffer-limit that `new` names."""
    error = ConfigError("Wrong number of arguments in buffer limit configuration.")
    if not new or len(new) % 4:
        raise error
    limits = {old[i]: old[i + 1 : i + 4] for i in range(0, len(old), 4)}
    sizes = Parameter("limit", "bytes", 0, "")
    for i in range(0, len(new), 4):
        name = {"slave": "replica"}.get(new[i].lower(), new[i].lower())
        if name not in limits:
            raise ConfigError("Invalid client class specified in buffer limit configuration.")
        limits[name] = (str(sizes.parse([new[i + 1]])), str(sizes.parse([new[i + 2]])), str(sizes.parse([new[i + 3]])))
    return tuple(word for name, three in limits.items() for word in (name, *three))


def _quoted(parameter: Parameter, value: Value) -> str:
    text = parameter.show(value)
    if parameter.kind in ("words", "limits") and text:
        return text
    if text and re.fullmatch(r"[\x21-\x7e]+", text) and not set(text) & set("\"'#\\"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def read_pairs(text: str, where: str) -> list[tuple[str, list[str]]]:
    """The (name, words) pairs of a configuration file's text. Raises ConfigError naming the line."""
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        words = split_inline(stripped.encode())
        if words is None or len(words) < 2:
            raise ConfigError(f"{where}, line {number}: a name and a value are needed: {stripped}")
        pairs.append((words[0].decode(), [word.decode() for word in words[1:]]))
    return pairs


def option_pairs(arguments: list[str]) -> list[tuple[str, list[str]]]:
    """The (name, words) pairs of `--name value ...` command line options."""
    pairs: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            pairs.append((name, [value] if equals else []))
        elif not pairs:
            raise ConfigError(f"'{argument}' is not an option; try --help")
        else:
            pairs[-1][1].append(argument)
    for name, words in pairs:
        if not words:
            raise ConfigError(f"--{name} needs a value")
    return pairs


def from_pairs(pairs: Iterable[tuple[str, list[str]]], file: Path | None = None) -> Config:
    """A Config from (name, words) pairs; later ones win, `model` adds up. Raises ConfigError naming the name."""
    values: dict[str, Value] = {}
    for name, words in pairs:
        parameter = PARAMETERS.get(name.lower())
        if parameter is None:
            raise ConfigError(f"there is no configuration name '{name}'")
        try:
            value = parameter.parse(words)
            if parameter.kind == "limits":
                old = values.get(parameter.name, parameter.default)
                assert isinstance(value, tuple) and isinstance(old, tuple)
                value = merge_limits(old, value)
        except ConfigError as error:
            raise ConfigError(f"{parameter.name}: {error}") from None
        before = values.get(parameter.name)
        if parameter.repeats and isinstance(before, tuple) and isinstance(value, tuple):
            value = before + value
        values[parameter.name] = value
    return Config(values, file)


def from_command_line(arguments: list[str]) -> Config:
    """The Config of `kvdb-server [FILE.conf] [--name value ...]`; options win over the file."""
    file: Path | None = None
    if arguments and not arguments[0].startswith("--"):
        file = Path(arguments[0]).absolute()
        arguments = arguments[1:]
    pairs = read_pairs(file.read_text(), str(file)) if file is not None else []
    return from_pairs([*pairs, *option_pairs(arguments)], file)
