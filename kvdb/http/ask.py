"""What a request asks for, and the events of its answer: the values between the dialects and the turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvdb.acl import User
from kvdb.session import Model
from kvdb_engine.chat import Thinking
from kvdb_engine.sampling import Sampling

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """How the model may use tools. kind: none, auto, required (some tool) or named (this one)."""

    kind: str = "auto"
    name: str = ""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    messages: a conversation in OpenAI form, or None for a raw prompt, which is text or token ids. max_tokens: None for
    as many as the context has room for. logprobs: how many alternatives are wanted at each token, or None.
    session: the key of the session to work in; snapshot: the key to store its state under at the end. call_prefix: what
    the ids of tool calls begin with.
    """

    user: User
    model: Model
    messages: tuple[Message, ...] | None
    prompt: str | tuple[int, ...] = ""
    tools: tuple[Any, ...] = ()
    choice: ToolChoice = ToolChoice()
    thinking: Thinking = Thinking.OFF
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    n: int = 1
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    session: str | None = None
    snapshot: str | None = None
    call_prefix: str = "call_"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled token and the best alternatives, most likely first, each as (bytes, logprob)."""

    data: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True, slots=True)
class IssuedCall:
    """A tool call under the id by which the client will answer it. arguments: JSON text of an object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Begin:
    """The prompt is in place: decoding begins. cached_tokens of its prompt_tokens were not computed."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """More of a choice. kind: reasoning or content; text may be empty when only logprobs are new."""

    choice: int
    kind: str
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Calls:
    """The tool calls of a choice, all at once."""

    choice: int
    calls: tuple[IssuedCall, ...]


@dataclass(frozen=True, slots=True)
class End:
    """A choice is over. reason: stop, length or tool_calls; stop: the stop string that ended it."""

    choice: int
    reason: str
    stop: str | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """The whole answer is over, and what must be stored is stored.

    cached_tokens + what was computed = prompt_tokens. session, snapshot: the keys, where the request named them; a
    snapshot that could not be stored (a full disk costs the state, not the answer) is not named.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    session: str | None = None
    snapshot: str | None = None


Event = Begin | Delta | Calls | End | Done


@dataclass(slots=True)
class Choice:
    """A choice collected whole, for answers that are not streamed."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[IssuedCall, ...] = ()
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str = "stop"
    stop: str | None = None


class Answer:
    """Collects events into choices and the final count."""

    def __init__(self, n: int) -> None:
        self.choices = [Choice() for _ in range(n)]
        self.done: Done | None = None

    def add(self, event: Event) -> None:
        """Take in one event."""
        if isinstance(event, Delta):
            choice = self.choices[event.choice]
            choice.logprobs += event.logprobs
            if event.kind == "reasoning":
                choice.reasoning += event.text
            else:
                choice.content += event.text
        elif isinstance(event, Calls):
            self.choices[event.choice].calls += event.calls
        elif isinstance(event, End):
            self.choices[event.choice].reason, self.choices[event.choice].stop = event.reason, event.stop
        elif isinstance(event, Done):
            self.done = event

    @property
    def usage(self) -> Done:
        """The final count; the answer must be complete."""
        assert self.done is not None
        return self.done
