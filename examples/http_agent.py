"""A stateless tool-using agent over HTTP with the official openai SDK: it sends everything again at every turn.

Run a server with HTTP first (`kvdb-server --http-port 8374`), then `python examples/http_agent.py [http://host:port]`.
The usage of each answer shows what the server had to compute: the new tokens only.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import openai

# The model was trained with these three tools, in this order and spelling.
SCHEMAS: list[dict[str, Any]] = [
    {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
    {
        "name": "note_write",
        "description": "Store a value in the note pad under a key.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string"}, "value": {"type": "string"}},
            "required": ["key", "value"],
        },
    },
    {
        "name": "note_read",
        "description": "Read the value stored in the note pad under a key.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
    },
]
TOOLS: Any = [{"type": "function", "function": schema} for schema in SCHEMAS]
REQUESTS = ["What is 17 plus 25?", "Save 42 under total.", "Read note total.", "What is 42 times 3?"]


class NotePad:
    """The agent's tools."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}

    def run(self, name: str, arguments: dict[str, str]) -> str:
        """Carry a call out; returns what the tool says."""
        if name == "calculator":
            for sign, compute in (("+", int.__add__), ("-", int.__sub__), ("*", int.__mul__)):
                left, found, right = arguments["expression"].partition(sign)
                if found and left.isdigit() and right.isdigit():
                    return str(compute(int(left), int(right)))
            return "error: not an expression"
        key = arguments["key"]
        if name == "note_write":
            self.notes[key] = arguments["value"]
            return f"ok: {key} = {arguments['value']}"
        return self.notes.get(key, f"error: no note {key}")


def main(url: str) -> None:
    """Work through the requests, and say what each answer cost."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
    pad = NotePad()
    messages: list[Any] = []
    for request in REQUESTS:
        messages.append({"role": "user", "content": request})
        while True:
            reply = client.chat.completions.create(
                model="dsv4-nano", messages=messages, tools=TOOLS, temperature=0, max_tokens=100
            )
            message, usage = reply.choices[0].message, reply.usage
            assert usage is not None and usage.prompt_tokens_details is not None
            cached = usage.prompt_tokens_details.cached_tokens or 0
            print(f"prompt {usage.prompt_tokens:4} tokens, computed {usage.prompt_tokens - cached:3}:", end=" ")
            messages.append(message)
            if not message.tool_calls:
                print(message.content)
                break
            for call in message.tool_calls:
                assert call.type == "function"
                result = pad.run(call.function.name, json.loads(call.function.arguments))
                print(f"{call.function.name}({call.function.arguments}) -> {result}")
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8374")
