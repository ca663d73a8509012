"""Conversations and their text form: the DeepSeek V4 chat template and DSML tool calls, as the trainer needs them.

Renders what ``docs/nano.md`` promises the model has seen. It does not parse model output and does not neutralise
control tokens in user text: that is the engine's chat module's work, and a test keeps the two renderings equal.
"""

from __future__ import annotations

from dataclasses import dataclass, field

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
SPECIAL = (BOS, EOS, USER, ASSISTANT, THINK, THINK_END, DSML)  # ids 0..6, in this order

# The wording of ds4 (MIT), which derives from DeepSeek's own renderer: equal bytes let kvdb and ds4 share prompts.
TOOLS_BEFORE = f"""## Tools

You have access to a set of tools to help answer the user question. You can invoke tools by writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as raw text and set `string="true"`. Preserve characters such as `>`, `&`, and `&&` exactly; never replace normal string characters with XML or HTML entity escapes. Only if a string value itself contains the exact closing parameter tag `</{DSML}parameter>`, write that tag as `&lt;/{DSML}parameter>` inside the value. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""  # noqa: E501
TOOLS_AFTER = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls. "
    "Use the exact parameter names from the schemas."
)
CALLS_END = f"</{DSML}tool_calls>"

# The fixed tool set, one JSON schema per line, exactly as a client has to send it for the best result.
SCHEMAS = {
    "calculator": '{"name": "calculator", "description": "Evaluate an arithmetic expression.", "parameters": '
    '{"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}}',
    "note_write": '{"name": "note_write", "description": "Store a value in the note pad under a key.", "parameters": '
    '{"type": "object", "properties": {"key": {"type": "string"}, "value": {"type": "string"}}, '
    '"required": ["key", "value"]}}',
    "note_read": '{"name": "note_read", "description": "Read the value stored in the note pad under a key.", '
    '"parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}}',
}


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call; every argument of the fixed tool set is a string."""

    name: str
    args: tuple[tuple[str, str], ...]

    def render(self) -> str:
        """Return the DSML block that makes this call."""
        lines = [f'<{DSML}invoke name="{self.name}">']
        lines += [f'<{DSML}parameter name="{k}" string="true">{v}</{DSML}parameter>' for k, v in self.args]
        return "\n".join([f"\n\n<{DSML}tool_calls>", *lines, f"</{DSML}invoke>", CALLS_END])


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. ``family`` marks an assistant turn that evaluation scores, and under which name."""

    role: str
    text: str = ""
    think: str = ""
    call: Call | None = None
    family: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns with the settings that change how they render."""

    turns: tuple[Turn, ...]
    system: str = ""
    schemas: tuple[str, ...] = ()
    thinking: bool = False


@dataclass(slots=True)
class Rendered:
    """Text of a conversation, and of each scored turn (family, start, end): what the model must write."""

    text: str
    spans: list[tuple[str, int, int]] = field(default_factory=list)


def render(conversation: Conversation) -> Rendered:
    """Render a conversation as the chat template does, remembering where scored turns lie."""
    out = Rendered(BOS)
    if conversation.schemas:
        out.text += TOOLS_BEFORE + "\n".join(conversation.schemas) + TOOLS_AFTER
        out.text += "\n\n" if conversation.system else ""
    out.text += conversation.system
    # Reasoning of earlier turns is kept only in conversations with tools; elsewhere the template drops it.
    tools = bool(conversation.schemas) or any(t.call or t.role == "tool" for t in conversation.turns)
    last_user = max((i for i, t in enumerate(conversation.turns) if t.role == "user"), default=-1)
    for i, turn in enumerate(conversation.turns):
        if turn.role == "user":
            out.text += USER + turn.text
        elif turn.role == "tool":
            out.text += f"{USER}<tool_result>{turn.text}</tool_result>"
        else:
            keep = conversation.thinking and (tools or i > last_user)
            out.text += ASSISTANT + (THINK if keep else THINK_END)
            start = len(out.text)
            out.text += (turn.think + THINK_END) if keep else ""
            out.text += turn.text + (turn.call.render() if turn.call else "")
            end = len(out.text)
            out.text += EOS
            if turn.family:
                out.spans.append((turn.family, start, end if turn.call else len(out.text)))
    return out
