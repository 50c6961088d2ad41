"""What every request must show before it is looked at: the right host, origin and token, and a bearable size.

A page of another site can make a browser send requests to this machine. It cannot read the token, which lies in the
fragment of the address that is printed at the start; nor pass under another name (`Host`, against DNS rebinding) or
from another page (`Origin`, `Sec-Fetch-Site`).
"""

import asyncio
import hmac
import json
from collections.abc import Iterable
from typing import Any

TOKEN_HEADER = "X-Headwater-Token"
SMALL, LARGE = 64 * 1024, 8 * 1024 * 1024
MAX_TARGET = 8 * 1024  # path and query
BODY_SECONDS = 30.0
_PAGE = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _PAGE,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Refused(Exception):
    """A request that is answered with an error and goes no further."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


def own_hosts(port: int) -> frozenset[str]:
    """What a browser may call this server by.

    Example:
        >>> sorted(own_hosts(8765))
        ['127.0.0.1:8765', '[::1]:8765', 'localhost:8765']
    """
    names = ("127.0.0.1", "localhost", "[::1]")
    bare = names if port == 80 else ()  # browsers leave the usual port out
    return frozenset([*(f"{name}:{port}" for name in names), *bare])


class Guard:
    """An ASGI application around another, which sees only requests that may be answered.

    Args:
        app: What answers.
        token: What requests for data must carry.
        port: Where the server listens.
        large: Paths whose bodies may hold `LARGE` bytes; all others take `SMALL`.
        body_seconds: How long a body may take to arrive.
    """

    def __init__(
        self,
        app: Any,
        *,
        token: str,
        port: int,
        large: Iterable[str] = (),
        body_seconds: float = BODY_SECONDS,
    ):
        self.app, self.token, self.hosts = app, token.encode(), own_hosts(port)
        self.large, self.body_seconds = frozenset(large), body_seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        api = scope["path"].startswith("/api")

        async def sealed(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": _sealed(message.get("headers", ()), api=api)}
            await send(message)

        try:
            self._check(scope, api=api)
            body = await asyncio.wait_for(self._body(scope, receive), self.body_seconds)
        except Refused as refusal:
            await _answer(sealed, refusal.status, str(refusal))
            return
        except TimeoutError:
            await _answer(sealed, 400, "The request's body did not arrive in time; send it again.")
            return
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Any:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replayed, sealed)

    def _check(self, scope: Any, *, api: bool) -> None:
        headers: dict[str, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value)

        def only(name: str) -> str | None:
            values = headers.get(name, [])
            if len(values) > 1:
                raise Refused(400, f"The request has {len(values)} headers {name}; send one.")
            return values[0].decode("latin-1") if values else None

        host, origin, site = only("host"), only("origin"), only("sec-fetch-site")
        if host is None or host.lower() not in self.hosts:
            raise Refused(
                421,
                "This server answers under its own address only; open the one printed at its start.",
            )
        if origin is not None and origin.lower() not in {f"http://{name}" for name in self.hosts}:
            raise Refused(403, "Requests of other pages are refused.")
        target = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
        if target > MAX_TARGET:
            raise Refused(400, f"The address of a request may have {MAX_TARGET:,} characters.")
        if not api:
            return
        if site is not None and site.lower() not in ("same-origin", "none"):
            raise Refused(403, "Requests of other pages are refused.")
        given = headers.get(TOKEN_HEADER.lower(), [])
        if len(given) != 1 or not hmac.compare_digest(given[0], self.token):
            raise Refused(
                401,
                "The token is missing or wrong; open the address that was printed at the start.",
            )

    async def _body(self, scope: Any, receive: Any) -> bytes:
        """The whole body, which must not be larger than it may be, whatever it says of its length."""
        most = LARGE if scope["path"] in self.large else SMALL
        said = next((v for k, v in scope["headers"] if k.lower() == b"content-length"), b"0")
        if not said.isdigit():
            raise Refused(400, "The length of the request's body is no number.")
        too_large = Refused(413, f"The request's body may hold {most:,} bytes; send less.")
        if len(said) > 18 or int(said) > most:
            raise too_large
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise Refused(400, "The request ended before its body did.")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise too_large
            more = message.get("more_body", False)
        return b"".join(parts)


def _sealed(headers: Iterable[tuple[bytes, bytes]], *, api: bool) -> list[tuple[bytes, bytes]]:
    """The headers of an answer, with those that keep the page to itself."""
    kept = "no-store" if api else "no-cache"
    ours = {name.lower().encode(): value.encode() for name, value in HEADERS.items()}
    ours[b"cache-control"] = kept.encode()
    return [(k, v) for k, v in headers if k.lower() not in ours] + list(ours.items())


async def _answer(send: Any, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # the rest of a body that was refused is not read
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
