"""The gateway itself: routes, and an HTTP server on the daemon's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from kvdb.acl import User
from kvdb.errors import KvdbError
from kvdb.http import access
from kvdb.http.ask import Ask
from kvdb.http.chat_api import ChatDialect, parse_chat
from kvdb.http.errors import BadRequest, anthropic_body, openai_body
from kvdb.http.fields import Fields
from kvdb.http.memory import Memory
from kvdb.http.messages_api import MessagesDialect, parse_messages
from kvdb.http.prompt import make_prompt
from kvdb.http.responses_api import ResponsesDialect, parse_responses
from kvdb.http.sse import GONE, error_response, respond
from kvdb.http.text_api import TextDialect, parse_text
from kvdb.http.turn import answer
from kvdb.net import metrics
from kvdb.net.listeners import tls_context
from kvdb.session import Model

if TYPE_CHECKING:
    from kvdb.net.service import Server

log = logging.getLogger("kvdb.http")

MAX_BODY_BYTES = 64 << 20  # as ds4
_STOP_S = 5  # clients may take so long to read the end of their answers
_SESSION_HEADER, _SNAPSHOT_HEADER = "x-kvdb-session", "x-kvdb-snapshot"

Handler = Callable[["Gateway", Request], Awaitable[Response]]


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the daemon has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


async def read_body(gateway: Gateway, request: Request) -> Fields:
    """The request's JSON object. Raises BadRequest, and what `user_of` raises before a byte of it is read."""
    gateway.user_of(request)
    packing = request.headers.get("content-encoding", "identity")
    if packing != "identity":
        raise BadRequest(f"content-encoding {packing} is not supported: send the body as it is", status=415)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise BadRequest(f"the body is over {MAX_BODY_BYTES} bytes", status=413)
    try:
        tree = json.loads(data)
        if b"\\ud" in data.lower():
            json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRequest("the body has half a surrogate pair: text that was cut inside a character") from None
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    return Fields(tree)


def open_sockets(hosts: list[str], port: int) -> list[socket.socket]:
    """Listening sockets for the words of `bind`; those with a dash may fail. Raises KvdbError."""
    opened: list[socket.socket] = []
    for word in hosts:
        address = {"*": "0.0.0.0", "::*": "::"}.get(word.removeprefix("-"), word.removeprefix("-"))
        try:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            opened.append(socket.create_server((address, port), family=family, backlog=128))
        except OSError as error:
            if word.startswith("-"):
                continue
            for one in opened:
                one.close()
            raise KvdbError(f"cannot listen on {address} HTTP port {port}: {error.strerror or error}") from None
    return opened


def _address(listening: socket.socket, tls: ssl.SSLContext | None) -> str:
    host, port = listening.getsockname()[:2]
    return f"{'http' if tls is None else 'https'}://{f'[{host}]' if ':' in host else host}:{port}"


class Gateway:
    """The HTTP side of a daemon. `start` listens, `stop` ends what is running and closes."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.memory = Memory(server.sessions)
        self.app = Starlette(routes=list(self._routes()), exception_handlers={HTTPException: self._unknown})
        self._running: list[tuple[_HttpServer, asyncio.Task[None]]] = []

    def _routes(self) -> Iterator[Route]:
        table: tuple[tuple[str, str, Handler, Any], ...] = (
            ("GET", "/v1/models", models, openai_body),
            ("GET", "/v1/models/{name:path}", model, openai_body),
            ("POST", "/v1/chat/completions", chat, openai_body),
            ("POST", "/v1/completions", text, openai_body),
            ("POST", "/v1/responses", responses, openai_body),
            ("GET", "/v1/responses/{id}", get_response, openai_body),
            ("DELETE", "/v1/responses/{id}", delete_response, openai_body),
            ("GET", "/healthz", healthz, openai_body),
            ("GET", "/metrics", prometheus, openai_body),
            ("POST", "/v1/messages", messages, anthropic_body),
            ("POST", "/v1/messages/count_tokens", count_tokens, anthropic_body),
        )
        for method, path, handler, shape in table:
            yield Route(path, self._guarded(path.replace(":path", ""), handler, shape), methods=[method])

    def _guarded(self, path: str, handler: Handler, shape: Callable[[KvdbError], dict[str, Any]]) -> Any:
        async def endpoint(request: Request) -> Response:
            try:
                response = await handler(self, request)
            except ClientDisconnect:
                response = Response(status_code=GONE)
            except Exception as error:
                response = error_response(shape, error)
            self.server.statistics.http_requests[path, response.status_code] += 1
            return response

        return endpoint

    async def _unknown(self, request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        self.server.statistics.http_requests["other", status] += 1
        what = f"{request.method} {request.url.path}"
        found = BadRequest(f"there is no {what} here" if status == 404 else f"{what}: {error}", status=status)
        shape = anthropic_body if request.url.path.startswith("/v1/messages") else openai_body
        return JSONResponse(shape(found), status_code=status)

    def base_of(self, request: Request, fields: Fields) -> dict[str, Any]:
        """What every request says, whatever its dialect: who asks, which model, which session and snapshot."""
        user = self.user_of(request)
        session = request.headers.get(_SESSION_HEADER)
        snapshot = request.headers.get(_SNAPSHOT_HEADER)
        access.check(user, session, snapshot)
        name = fields.get("model", str)
        return {"user": user, "model": self.model(name), "session": session, "snapshot": snapshot}

    def user_of(self, request: Request) -> User:
        """Who asks. Raises NoAuthError, WrongPassError, or NoPermError for strangers in protected mode."""
        user = access.user_of(self.server.acl, access.key_of(request.headers))
        if user.is_nopass and self.server.config.flag("protected-mode"):
            access.check_local(request.client.host if request.client else None, request.url.hostname)
        return user

    def model(self, name: str | None) -> Model:
        """A served model; the first one when the request names none."""
        models = self.server.sessions.models
        if name is not None and models and name not in models:
            raise BadRequest(
                f"model '{name}' is not served here; there are: {', '.join(models)}",
                "model",
                status=404,
                code="model_not_found",
            )
        return self.server.sessions.model(name)

    async def start(self) -> None:
        """Listen on `http-port` and `http-tls-port` of every address of `bind`.

        Raises KvdbError when a port cannot be had or the TLS files cannot be used.
        """
        config = self.server.config
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # the daemon says itself that it listens
        await self.memory.wake()
        if config.number("http-port"):
            await self._listen(config.number("http-port"), None)
        if config.number("http-tls-port"):
            await self._listen(config.number("http-tls-port"), tls_context(config))

    async def _listen(self, port: int, tls: ssl.SSLContext | None) -> None:
        config = uvicorn.Config(
            self.app,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=_STOP_S,
            limit_concurrency=self.server.config.number("maxclients"),
        )
        config.load()
        config.ssl = tls  # the daemon's own settings, with client certificates, which uvicorn's options do not all have
        sockets = open_sockets(list(self.server.config.words("bind")), port)
        http = _HttpServer(config)
        task = asyncio.create_task(http.serve(sockets=sockets))
        while not http.started and not task.done():
            await asyncio.sleep(0.005)
        if task.done():
            task.result()
        self._running.append((http, task))
        log.info("HTTP on %s", ", ".join(_address(one, tls) for one in sockets))

    async def stop(self) -> None:
        """Stop listening and end the answers under way, as at a shutdown all work ends."""
        self.server.sessions.stop_work()
        for http, _ in self._running:
            http.should_exit = True
        for _, task in self._running:
            await task


def _usage_wanted(fields: Fields) -> bool:
    return bool((fields.get("stream_options", dict) or {}).get("include_usage"))


async def _answer(gateway: Gateway, request: Request, fields: Fields, ask: Ask, dialect: Any) -> Response:
    stream = fields.get("stream", bool, False)
    return await respond(request, ask, answer(gateway.memory, ask), dialect, stream=stream)


async def chat(gateway: Gateway, request: Request) -> Response:
    """POST /v1/chat/completions."""
    fields = await read_body(gateway, request)
    ask = parse_chat(fields, gateway.base_of(request, fields))
    return await _answer(gateway, request, fields, ask, ChatDialect(ask, include_usage=_usage_wanted(fields)))


async def text(gateway: Gateway, request: Request) -> Response:
    """POST /v1/completions."""
    fields = await read_body(gateway, request)
    ask = parse_text(fields, gateway.base_of(request, fields))
    return await _answer(gateway, request, fields, ask, TextDialect(ask, include_usage=_usage_wanted(fields)))


async def responses(gateway: Gateway, request: Request) -> Response:
    """POST /v1/responses."""
    fields = await read_body(gateway, request)
    ask, new = parse_responses(fields, gateway.base_of(request, fields), gateway.memory)
    return await _answer(gateway, request, fields, ask, ResponsesDialect(ask, fields, new, gateway.memory))


def _stored(gateway: Gateway, request: Request) -> tuple[str, dict[str, Any]]:
    user = gateway.user_of(request)
    access.check(user, None, None)
    response_id = request.path_params["id"]
    found = gateway.memory.response(response_id, user.name)
    if found is None:
        raise BadRequest(f"response '{response_id}' is not stored here", status=404)
    return response_id, found


async def get_response(gateway: Gateway, request: Request) -> Response:
    """GET /v1/responses/ID."""
    return JSONResponse(_stored(gateway, request)[1]["body"])


async def delete_response(gateway: Gateway, request: Request) -> Response:
    """DELETE /v1/responses/ID."""
    response_id, _ = _stored(gateway, request)
    gateway.memory.drop_response(response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


async def healthz(gateway: Gateway, request: Request) -> Response:
    """GET /healthz: 200 and ok, or 503 and why writes are refused. Needs no key: load balancers have none."""
    is_well, word = metrics.health(gateway.server)
    return PlainTextResponse(word + "\n", status_code=200 if is_well else 503)


async def prometheus(gateway: Gateway, request: Request) -> Response:
    """GET /metrics."""
    gateway.user_of(request)
    return Response(metrics.render(gateway.server), headers={"content-type": metrics.CONTENT_TYPE})


async def messages(gateway: Gateway, request: Request) -> Response:
    """POST /v1/messages."""
    fields = await read_body(gateway, request)
    ask = parse_messages(fields, gateway.base_of(request, fields))
    return await _answer(gateway, request, fields, ask, MessagesDialect(ask))


async def count_tokens(gateway: Gateway, request: Request) -> Response:
    """POST /v1/messages/count_tokens."""
    fields = await read_body(gateway, request)
    ask = parse_messages(fields, gateway.base_of(request, fields), is_count=True)
    prompt = await make_prompt(ask, gateway.memory)
    return JSONResponse({"input_tokens": len(prompt.ids)})


def _model_body(model: Model) -> dict[str, Any]:
    return {
        "id": model.info.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "kvdb",
        "context_length": model.info.config.context,
        "fingerprint": model.info.fingerprint.hex(),
    }


async def models(gateway: Gateway, request: Request) -> Response:
    """GET /v1/models."""
    gateway.user_of(request)
    data = [_model_body(one) for one in gateway.server.sessions.models.values()]
    return JSONResponse({"object": "list", "data": data})


async def model(gateway: Gateway, request: Request) -> Response:
    """GET /v1/models/NAME."""
    gateway.user_of(request)
    return JSONResponse(_model_body(gateway.model(request.path_params["name"])))
