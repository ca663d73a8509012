"""Rows of the command table: states of models, the engine and the store."""

from kvdb.commands.spec import Command

_INPUT = "TEXT text|TOKENS count id [id ...]|IDS bytes|CHAT json"
_SAMPLING = "[TEMPERATURE f] [TOPK n] [TOPP f] [MINP f] [SEED n]"
_ENGINE_ERRORS = "NOENGINE ENGINEDOWN BUSY CANCELLED TOOLONG WRONGMODEL"
_READ_ERRORS = "CORRUPT WRONGMODEL"


def _row(
    name: str,
    arity: int,
    flags: str,
    keys: tuple[int, int, int],
    syntax: str,
    summary: str,
    complexity: str = "O(1)",
    errors: str = "",
) -> Command:
    group = {"ENGINE": "engine", "STORE": "store"}.get(name.partition(" ")[0], "state")
    return Command(name, group, arity, flags, keys, group, syntax, summary, complexity, "0.1.0", errors)


ROWS = (
    _row("PREFILL", -4, "write denyoom no_multi", (1, 1, 1),
         f"session {_INPUT} [MODEL model] [REUSE YES|NO|ONLY] [DEADLINE ms]",
         "Makes the session's timeline exactly this; reuses the longest live or stored prefix",
         "O(N) in the tokens that are not reused", _ENGINE_ERRORS),
    _row("EXTEND", -4, "write denyoom no_multi", (1, 1, 1), f"session {_INPUT} [DEADLINE ms]",
         "Appends to the session's timeline", "O(N) in the appended tokens", _ENGINE_ERRORS),
    _row("GENERATE", -2, "write denyoom no_multi", (1, 1, 1),
         f"session [MAXTOKENS n] {_SAMPLING} [STOP count string [string ...]] [STREAM] [DEADLINE ms]",
         "Decodes tokens and appends them to the session's timeline", "O(N) in the generated tokens", _ENGINE_ERRORS),
    _row("SNAPSHOT", -3, "write denyoom no_multi", (1, 2, 1),
         "session key [META count field value [field value ...]] [EX seconds|PX milliseconds] [NX|XX] [PIN] [ASYNC]",
         "Stores the session's state durably under a key", "O(N) in the tokens since the last snapshot",
         "NOSPACE ENGINEDOWN BUSY"),
    _row("WAITSNAP", 2, "readonly no_multi", (1, 1, 1), "key", "Waits until SNAPSHOT ... ASYNC of this key is durable",
         "O(1)", "NOSPACE ENGINEDOWN CANCELLED"),
    _row("RESTORE", -3, "write denyoom no_multi", (1, 2, 1), "key session [REPLACE]",
         "Gives a session the state of a snapshot",
         "O(N) in the tokens of the snapshot, O(1) for a live session that stands there", f"{_READ_ERRORS} BUSYKEY"),
    _row("FORK", -3, "write denyoom fast no_multi", (1, -1, 1), "source dest [dest ...]",
         "Names the state of a snapshot or session again; no page is copied", "O(1) for each name", "BUSY"),
    _row("REWIND", 4, "write no_multi", (1, 1, 1), "session TO key|TOKENS n|STEPS n",
         "Takes a session back to an ancestor of its state", "O(N) in the tokens past the nearest snapshot",
         f"{_READ_ERRORS} BUSY"),
    _row("PREFIX", -3, "readonly", (0, 0, 0), f"{_INPUT} [MODEL model]", "Finds the longest stored prefix",
         "O(log N) in the pages", "NOENGINE"),
    _row("SAMPLE", -2, "readonly no_multi", (1, 1, 1), f"key|session [COUNT n] {_SAMPLING}",
         "Draws next tokens from the stored logits, without a forward pass", "O(N) in the count", _READ_ERRORS),
    _row("LOGITS", -2, "readonly no_multi", (1, 1, 1), "key|session [TOP k|RAW]", "The stored logits of the next token",
         "O(N) in the vocabulary", _READ_ERRORS),
    _row("LINEAGE", 2, "readonly", (1, 1, 1), "key", "The chain of snapshots a state descends from",
         "O(N) in the ancestors"),
    _row("SNAPINFO", 2, "readonly fast", (1, 1, 1), "key", "Describes a snapshot"),
    _row("SNAPDIFF", 3, "readonly no_multi", (1, 2, 1), "key1 key2", "What two snapshots share and where they part",
         "O(N) in the pages"),
    _row("PIN", 2, "write fast", (1, 1, 1), "key", "Protects a snapshot from eviction"),
    _row("UNPIN", 2, "write fast", (1, 1, 1), "key", "Ends PIN"),
    _row("TOKENIZE", 3, "readonly", (0, 0, 0), "model text", "Text to token ids", "O(N)", "NOENGINE"),
    _row("DETOKENIZE", -3, "readonly", (0, 0, 0), "model id [id ...]", "Token ids to text", "O(N)", "NOENGINE"),
    Command("ENGINE", "engine", -2, summary="Container of the engine commands", since="0.1.0", is_container=True),
    _row("ENGINE LOAD", -2, "admin no_multi", (0, 0, 0), "[model]", "Starts the engine of a model", "O(1)",
         "NOENGINE ENGINEDOWN"),
    _row("ENGINE UNLOAD", -2, "admin no_multi", (0, 0, 0), "[model]",
         "Snapshots the live sessions of a model and stops its engine", "O(N) in the sessions", "NOENGINE"),
    _row("ENGINE STATUS", -2, "readonly", (0, 0, 0), "[model]", "Describes an engine and its queue"),
    _row("ENGINE MODELS", 2, "readonly", (0, 0, 0), "", "Lists the models that can be run"),
    _row("ENGINE CANCEL", 3, "write no_multi", (2, 2, 1), "session", "Stops the work of a session at the next chunk"),
    Command("STORE", "store", -2, summary="Container of the store commands", since="0.1.0", is_container=True),
    _row("STORE STATS", 2, "readonly no_multi", (0, 0, 0), "", "Bytes, pages, segments, and what is shared"),
    _row("STORE VERIFY", -2, "admin no_multi", (0, 0, 0), "[DEEP] [RATE bytes]",
         "Checks every record's checksum; DEEP also checks every identity", "O(N) in the stored bytes"),
    _row("STORE GC", 2, "admin no_multi", (0, 0, 0), "", "Frees the bytes that nothing reaches", "O(N) in the records"),
    _row("STORE COMPACT", 2, "admin no_multi", (0, 0, 0), "", "Moves live records out of sparse segments",
         "O(N) in the moved bytes", "NOSPACE"),
    _row("STORE BACKUP", 3, "admin no_multi", (0, 0, 0), "name",
         "Writes a consistent copy of the whole store below transfer-dir", "O(N) in the stored bytes", "NOSPACE"),
    _row("STORE EXPORT", -4, "readonly no_multi", (2, 2, 1), "key FILE name|DATA [FORMAT KV|ARCHIVE]",
         "Writes a snapshot as a ds4 .kv file or a kvdb archive", "O(N) in the tokens", f"{_READ_ERRORS} NOSPACE"),
    _row("STORE IMPORT", 5, "write denyoom no_multi", (2, 2, 1), "key FILE name|DATA bytes",
         "Reads a ds4 .kv file or a kvdb archive into a snapshot", "O(N) in the tokens", f"{_READ_ERRORS} NOSPACE"),
)  # fmt: skip
