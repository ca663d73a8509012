"""One choice being read: sampled tokens in, events out, with stop strings cut and characters whole.

The timeline holds every sampled token; the client sees text. `is_whole` says that the two agree, that is, that what the
client will send back next time means this timeline: no stop string was cut off, nothing malformed was shown as text.
"""

from __future__ import annotations

from kvdb.http.ask import Calls, Delta, Event, IssuedCall, TokenLogprob
from kvdb_engine.dsml import Piece, ReplyParser
from kvdb_engine.tokenizer import Tokenizer


class ChoiceReader:
    """Reads one choice.

    is_chat: text may hold reasoning and tool calls. has_tools: the model may call tools; otherwise a tool block that it
    writes all the same is shown as the text it is. new_id: what tool-call ids begin with.
    """

    def __init__(
        self,
        choice: int,
        tokenizer: Tokenizer,
        stops: tuple[str, ...],
        *,
        is_chat: bool,
        has_tools: bool,
        thinking: bool,
        forced: str,
        new_id: str,
    ) -> None:
        self.choice = choice
        self.n_tokens = 0
        self.n_reasoning_tokens = 0
        self.stop: str | None = None
        self.is_over = False
        self.calls: tuple[IssuedCall, ...] = ()
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream()
        self._stops = stops
        self._new_id = new_id
        self._has_tools = has_tools
        self._held = ""
        self._parser = ReplyParser(thinking=thinking) if is_chat else None
        self._reasons = thinking and is_chat
        self._logprobs: list[TokenLogprob] = []
        self._is_changed = False
        self._raw: list[str] = []
        if forced and self._parser is not None:
            self._parser.feed(forced)

    @property
    def is_whole(self) -> bool:
        """Whether the client sees all that the timeline holds, so that sending it back means this timeline."""
        return self.stop is None and not self._is_changed and not self._held and not self.reply_is_cut

    @property
    def reply_is_cut(self) -> bool:
        """Whether a tool block was begun and not ended."""
        return self._parser is not None and self._parser.reply().is_cut

    @property
    def content(self) -> str:
        """The content so far."""
        return self._parser.reply().content if self._parser is not None else "".join(self._raw)

    @property
    def block(self) -> str:
        """The tool block, if calls were made."""
        return self._parser.reply().block if self._parser is not None else ""

    def feed(self, token: int, logprob: TokenLogprob | None = None) -> list[Event]:
        """Take in a sampled token."""
        if self.is_over:
            return []
        self.n_tokens += 1
        self.n_reasoning_tokens += self._reasons
        if logprob is not None:
            self._logprobs.append(logprob)
        if self._parser is not None and token in (self._tokenizer.user, self._tokenizer.assistant):
            # The model speaks for the other side: its answer is over, and the timeline has a token too many.
            self._is_changed = True
            return self._end()
        if token == self._tokenizer.eos_id:
            # A raw text that goes on does not go on behind an end token; a conversation does.
            self._is_changed = self._is_changed or self._parser is None
            return self._end()
        return self._take(self._decoder.feed([token]))

    def finish(self) -> list[Event]:
        """No more tokens come."""
        return [] if self.is_over else self._end()

    def _end(self) -> list[Event]:
        self.is_over = True
        cut = self._decoder.finish()
        self._is_changed = self._is_changed or bool(cut)  # half a character: the client cannot send it back
        text, self._held = self._held + cut, ""
        events = self._pieces(self._parse(text) + (self._parser.finish() if self._parser is not None else []))
        if self._logprobs:
            events.append(self._delta("content", ""))
        return events

    def _take(self, text: str) -> list[Event]:
        text, self._held = self._held + text, ""
        cuts = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if cuts:
            at, self.stop = min(cuts, key=lambda cut: cut[0])
            events = self._pieces(self._parse(text[:at]))
            self._held = ""
            return events + self._end()
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        events = self._pieces(self._parse(text[: len(text) - keep]))
        if self._parser is not None and self._parser.is_done:
            self.is_over = True
        return events

    def _parse(self, text: str) -> list[Piece]:
        if self._parser is None:
            self._raw.append(text)
            return [Piece("content", text)] if text else []
        return self._parser.feed(text)

    def _pieces(self, pieces: list[Piece]) -> list[Event]:
        events: list[Event] = []
        for piece in pieces:
            self._reasons = self._reasons and piece.kind == "reasoning"
            if piece.kind == "calls" and not self._has_tools:
                self._is_changed = True
                events.append(self._delta("content", piece.text))
            elif piece.kind == "calls":
                numbered = enumerate(piece.calls, start=len(self.calls))
                calls = tuple(IssuedCall(f"{self._new_id}{n:x}", call.name, call.arguments) for n, call in numbered)
                self.calls += calls
                events.append(Calls(self.choice, calls))
            else:
                events.append(self._delta(piece.kind, piece.text))
        return events

    def _delta(self, kind: str, text: str) -> Delta:
        logprobs, self._logprobs = tuple(self._logprobs), []
        return Delta(self.choice, kind, text, logprobs)


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
