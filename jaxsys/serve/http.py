"""The OpenAI-compatible HTTP front of a service. docs/serving.md says what each endpoint does."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxsys.llm import LLM
from jaxsys.serve import protocol
from jaxsys.serve.answers import Answer
from jaxsys.serve.errors import Refused
from jaxsys.serve.metrics import Metrics
from jaxsys.serve.openapi import document
from jaxsys.serve.protocol import Call, Kind
from jaxsys.serve.request import Request
from jaxsys.serve.service import Busy, Closed, Service
from jaxsys.serve.watch import Watch
from jaxsys.share import DeviceShare
from parallelism.errors import UserError

# For a client to send its body.
BODY_SECONDS = 60.0


class Front:
    """The HTTP application (ASGI) over one model, and the service that runs its requests.

    name: of the model, as clients ask for it. keys: API keys, any of which is needed; none: everybody may ask.
    max_queue: requests that may wait. max_body: bytes of a body. share: of the devices with others. Close it when the
    application has ended.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        name: str,
        keys: Sequence[str] = (),
        max_queue: int = 1024,
        max_body: int = 4 << 20,
        share: DeviceShare | None = None,
    ):
        self.llm, self.name, self.max_body = llm, name, max_body
        self.calls = 0  # that are being answered
        self.draining = False
        self._keys = [_digest(key.encode()) for key in keys]
        self.metrics = Metrics()
        self._document = document(name, bool(keys))
        self._began = int(time.time())
        self.service = Service(llm.engine, max_queue=max_queue, finished=self.metrics.finished, share=share)
        self.metrics.watch(self.service)
        posts: dict[str, Callable[[HTTPRequest], Awaitable[Response]]] = {
            "/v1/completions": lambda request: self._generate(request, "completion"),
            "/v1/chat/completions": lambda request: self._generate(request, "chat"),
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
        }
        gets: dict[str, Callable[[HTTPRequest], Awaitable[Response]]] = {
            "/v1/models": self._models,
            "/v1/models/{model:path}": self._model,
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._metrics_text,
            "/openapi.json": self._openapi,
        }
        routes = [Route(path, self._counted(path, f), methods=["POST"]) for path, f in posts.items()]
        routes += [Route(path, self._counted(path, f), methods=["GET"]) for path, f in gets.items()]
        self._paths = {*posts, *gets}
        self._routed = Starlette(routes=routes, exception_handlers={HTTPException: self._unrouted, Exception: _answer})
        self._routed.router.redirect_slashes = False  # another path is another path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        try:
            await self._routed(scope, receive, send)
        except asyncio.CancelledError:  # by uvicorn, which ends and would call it a defect
            pass
        finally:
            self.calls -= 1

    def close(self) -> None:
        """Ends the service; what still runs is cancelled."""
        self.draining = True
        self.service.close()

    # ---------------------------------------------------------------------------------------------- generation

    async def _generate(self, request: HTTPRequest, kind: Kind) -> Response:
        key = self._authorised(request)
        if self.draining:
            raise Refused(self.service.reason, status=503, code="unavailable", retry=5.0)
        raw = await self._body(request)
        call, sequences = await run_in_threadpool(self._prepare, kind, raw, key)
        if call.stream and self.llm.engine.config.new_weights == "restart":
            raise Refused(
                "stream: requests begin again here when the weights change, so nothing can be sent before the end: "
                "leave it out",
                param="stream",
            )
        watch = Watch(self.service, sequences, call.stream)
        answer = Answer(call, sequences, self.llm.tokenizer, self.name)
        watch.submit()
        if call.stream:
            return _Stream(answer, watch)
        try:
            await _unless_gone(request.receive, watch.finished())
            return _json(await run_in_threadpool(answer.whole))
        finally:
            watch.cancel()

    def _prepare(self, kind: Kind, raw: bytes, key: str) -> tuple[Call, list[Request]]:
        """What a body asks for; on a thread of its own, as texts may be long."""
        with protocol.named_fields(kind):
            call = protocol.read(kind, raw, self.llm, self.name, self.service.max_queue)
            sequences = call.requests(self.llm)
        for each in sequences:
            each.client = f"{key}/{call.user}"  # a user is one of the key's, so that nobody can pass for another's
        return call, sequences

    # ------------------------------------------------------------------------------------------------- the rest

    async def _tokenize(self, request: HTTPRequest) -> Response:
        self._authorised(request)
        tokens = await run_in_threadpool(protocol.tokenize, await self._body(request), self.llm, self.name)
        return _json({"tokens": tokens, "count": len(tokens), "max_model_len": self.llm.engine.max_context})

    async def _detokenize(self, request: HTTPRequest) -> Response:
        self._authorised(request)
        text = await run_in_threadpool(protocol.detokenize, await self._body(request), self.llm, self.name)
        return _json({"prompt": text})

    async def _models(self, request: HTTPRequest) -> Response:
        self._authorised(request)
        return _json({"object": "list", "data": [self._card()]})

    async def _model(self, request: HTTPRequest) -> Response:
        self._authorised(request)
        if request.path_params["model"] != self.name:
            raise Refused(
                f"model {request.path_params['model']!r:.80} is not served here, {self.name!r} is",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip
        return _json(self._card())

    def _card(self) -> dict[str, Any]:
        context = self.llm.engine.max_context
        return {
            "id": self.name, "object": "model", "created": self._began, "owned_by": "jaxsys", "max_model_len": context,
        }  # fmt: skip

    async def _health(self, request: HTTPRequest) -> Response:
        if self.service.error is not None:
            raise Refused(self.service.reason, status=503, code="unavailable")
        return _json({"status": "ok"})

    async def _ready(self, request: HTTPRequest) -> Response:
        if self.draining or self.service.error is not None:
            raise Refused(self.service.reason, status=503, code="unavailable")
        return _json({"status": "ready"})

    async def _metrics_text(self, request: HTTPRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _openapi(self, request: HTTPRequest) -> Response:
        return _json(self._document)

    # ---------------------------------------------------------------------------------------- what all go through

    def _counted(
        self, path: str, endpoint: Callable[[HTTPRequest], Awaitable[Response]]
    ) -> Callable[[HTTPRequest], Awaitable[Response]]:
        async def counted(request: HTTPRequest) -> Response:
            status = 500
            try:
                response = await endpoint(request)
                status = response.status_code
                return response
            except ClientDisconnect:
                status = 499
                return Response(status_code=499)
            except (UserError, Busy, Closed) as error:
                response = await _answer(request, error)
                status = response.status_code
                return response
            finally:
                self.metrics.called(path, status)

        return counted

    async def _unrouted(self, request: HTTPRequest, error: Exception) -> Response:
        """What no endpoint answers: another path, or a method that the path does not have."""
        response = await _answer(request, error)
        path = request.url.path if request.url.path in self._paths else "other"  # a client may think of many
        self.metrics.called(path, response.status_code)
        return response

    def _authorised(self, request: HTTPRequest) -> str:
        """Which key the call has, none if none is needed. Raises Refused, 401, without one."""
        if not self._keys:
            return "no key"
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip().encode("latin-1"))  # as Starlette decoded it
        # All are compared, each in a time that does not depend on where it differs.
        found = [i for i, key in enumerate(self._keys) if hmac.compare_digest(key, digest)]
        if scheme.lower() != "bearer" or not found:
            raise Refused(
                "no valid API key: send the header 'Authorization: Bearer KEY'", status=401, code="invalid_api_key"
            )
        return f"key {found[0]}"

    async def _body(self, request: HTTPRequest) -> bytes:
        """The body. Raises Refused: 413 where it is too large, 408 where it does not come, 415 where it is coded."""
        if (encoding := request.headers.get("content-encoding", "identity")).lower() != "identity":
            raise Refused(f"Content-Encoding: found {encoding!r:.40}, expected none: send it plain", status=415)
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size > self.max_body:
                        raise Refused(
                            f"found a body of more than {self.max_body} bytes, expected at most so many: send less",
                            status=413, code="body_too_large",
                        )  # fmt: skip
                    parts.append(part)
        except TimeoutError:
            raise Refused(f"no whole body within {BODY_SECONDS:.0f} s", status=408, code="body_timeout") from None
        return b"".join(parts)


class _Stream(Response):
    """Server-sent events: a chunk a line, ``[DONE]`` at the end. Who goes away before has their requests dropped."""

    def __init__(self, answer: Answer, watch: Watch):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._answer, self._watch = answer, watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self._write(send))
        except ClientDisconnect:
            pass
        finally:
            self._watch.cancel()

    async def _write(self, send: Send) -> None:
        async def event(data: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for states in self._watch.states():
                for chunk in self._answer.pieces(states):
                    await event(json.dumps(chunk, allow_nan=False))
            if (last := self._answer.last()) is not None:
                await event(json.dumps(last))
            await event("[DONE]")
        except (Refused, Closed) as error:
            await event(json.dumps(_refused(error).body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs ``work``; raises ClientDisconnect, and cancels it, when the client goes away before it is done."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _answer(request: HTTPRequest, error: Exception) -> Response:
    """Any error in OpenAI's shape."""
    if isinstance(error, Refused | Busy | Closed | UserError):
        refused = _refused(error)
    elif isinstance(error, HTTPException):
        allowed = " or ".join(sorted((error.headers or {}).get("Allow", "another").split(", ")))
        known = {
            404: f"no such path: {request.url.path:.80}",
            405: f"{request.method} is not for {request.url.path:.80}, expected {allowed}",
        }
        refused = Refused(known.get(error.status_code, error.detail), status=error.status_code)
    else:
        refused = Refused("a defect of the server; its log has more", status=500, code="internal_error")
    headers = dict(getattr(error, "headers", None) or {}) | refused.headers
    return _json(refused.body, refused.status, headers)


def _refused(error: Exception) -> Refused:
    """What a client may be told of as it is."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Busy):
        return Refused(str(error), status=429, code="queue_full", retry=error.seconds)
    if isinstance(error, Closed):
        return Refused(str(error), status=503, code="unavailable", retry=5.0)
    return Refused(str(error))


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # ASCII, so that whatever a client sent can be sent back.
    return Response(json.dumps(value, allow_nan=False), status, headers, "application/json")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
