"""kvdb-dump kv FILE.kv: a session file of ds4."""

from __future__ import annotations

from pathlib import Path

import click

from kvdb_protocol.dsv4 import HEADER_BYTES, Dsv4Header
from kvdb_protocol.kvc import KvcFlags, decode_kvc
from kvdb_tools.dump.record import ids, likeliest
from kvdb_tools.dump.source import FILE, Json, excerpt, exit_codes, json_option, print_facts, print_json, when


@click.command()
@click.argument("file", metavar="FILE.kv", type=FILE)
@json_option
def kv(file: Path, as_json: bool) -> None:
    """Show a ds4 .kv file: why and when it was saved, its text, its token ids, its next token.

    Example: kvdb-dump kv 157c005edcfc4e265a700ae935302952f8bb9b75.kv
    """
    with exit_codes():
        found = decode_kvc(file.read_bytes())
        header = Dsv4Header.from_bytes(found.payload)
    payload = memoryview(found.payload)
    at = HEADER_BYTES + 4 * header.n_tokens
    facts: Json = {
        "name_fits_text": file.name == found.name,
        "reason": found.reason.name.lower().replace("_", "-"),
        "flags": [flag.name.lower() for flag in KvcFlags if found.flags & flag and flag.name],
        "expert_bits": found.quant_bits,
        "tokens": found.n_tokens,
        "hits": found.hits,
        "context": found.context,
        "created": when(found.created_s * 1000),
        "used": when(found.used_s * 1000),
        "text_bytes": len(found.text),
        "text": excerpt(found.text, 400),
        "payload_bytes": len(payload),
        "payload_version": header.version,
        "layers": header.n_layers,
        "head_dim": header.head_dim,
        "index_dim": header.index_dim,
        "vocab": header.vocab,
        "window": header.window,
        "ids": ids(bytes(payload[HEADER_BYTES:at])),
        "likeliest": likeliest(bytes(payload[at : at + 4 * header.vocab])),
        "tools": len(found.tools),
    }
    if as_json:
        print_json(facts)
    else:
        print_facts(list(facts.items()))
