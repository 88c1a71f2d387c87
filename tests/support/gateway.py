"""An HTTP gateway before the simulated contact centre, as companies have one, and what it may do.

It forwards requests as they are, over TLS if it is given a certificate, and decides only what a gateway
decides: who has its cookie, whether websockets pass, and what it says in the server's place. It stands for
everything between us and a server that is well; `tests.peers.proxy` does the same for the network below HTTP.
"""

import secrets
import ssl
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import msgspec
from aiohttp import web

HOST = "127.0.0.1"
COOKIE = "GATEWAY"
LOGIN = "/api/v2/me"
REQUEST_BYTES_MAX = 2**20
STOP_s = 0.05
"""How long it waits for requests that are open when it stops."""
PASSED_ON = ("Authorization", "Content-Type", "Cookie", "X-CSRF-TOKEN")
PASSED_BACK = ("Content-Type", "Set-Cookie", "X-CSRF-HEADER", "X-CSRF-TOKEN")

Says = Callable[[str, list[dict[str, object]]], web.Response | None]
"""Given the path and the Bayeux messages of a request (none for REST), an answer in the server's place."""


def reply(status: int, body: object, **headers: str) -> web.Response:
    """An answer in JSON."""
    raw = msgspec.json.encode(body)
    return web.Response(status=status, body=raw, content_type="application/json", headers=headers)


def on(channel: str, error: str, **advice: object) -> Says:
    """Says that the exchange on this meta channel failed, with this advice."""

    def says(_path: str, messages: list[dict[str, object]]) -> web.Response | None:
        if not any(message["channel"] == channel for message in messages):
            return None
        return reply(
            200,
            [
                {"channel": message["channel"], "id": message["id"], "successful": False, "error": error}
                | ({"advice": advice} if advice else {})
                for message in messages
            ],
        )

    return says


class Gateway:
    """Listens on a port of its own and forwards to `target`, a URL without a path; used with `async with`."""

    def __init__(self, target: str, tls: ssl.SSLContext | None = None) -> None:
        self.says: Says | None = None
        """What it says in the server's place; may be changed at any time."""
        self.wants_cookie = False
        """Whether a request other than the login needs the cookie that the login gave."""
        self.websockets = True
        """Whether an upgrade is passed on: it is answered 400 if not, and never served."""
        self.asked: Counter[str] = Counter()
        """How often each path was asked for."""
        self.port = 0
        self._target = target
        self._tls = tls
        self._cookies: set[str] = set()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Where it listens, without a path."""
        return f"{'https' if self._tls else 'http'}://{HOST}:{self.port}"

    async def __aenter__(self) -> Self:
        await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    def expire(self) -> None:
        """Forgets every cookie that it gave."""
        self._cookies.clear()

    async def renew(self, tls: ssl.SSLContext) -> None:
        """Shows another certificate from now on; every connection ends."""
        await self._stop()
        self._tls = tls
        await self._start()

    async def _start(self) -> None:
        app = web.Application(client_max_size=REQUEST_BYTES_MAX)
        app.router.add_route("*", "/{path:.*}", self._serve)
        # Whoever waits for an answer and goes away takes his request with him, as at the server itself.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=STOP_s)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, self.port, ssl_context=self._tls).start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.asked[request.path] += 1
        body = await request.read()
        messages = msgspec.json.decode(body) if body.startswith(b"[") else []
        if self.says is not None and (said := self.says(request.path, messages)) is not None:
            return said
        if "Upgrade" in request.headers and not self.websockets:
            return web.Response(status=400, text="no websockets here\n")
        login = request.path == LOGIN
        if self.wants_cookie and not login and request.cookies.get(COOKIE) not in self._cookies:
            return reply(403, {"statusCode": 20, "statusMessage": "Access denied"})
        answer = await self._forward(request, body)
        if login and answer.status == 200:
            cookie = secrets.token_hex(8)
            self._cookies.add(cookie)
            answer.set_cookie(COOKIE, cookie, path="/", httponly=True)
        return answer

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        headers = [(name, request.headers[name]) for name in PASSED_ON if name in request.headers]
        async with (
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http,
            http.request(
                request.method, self._target + request.path_qs, data=body or None, headers=headers
            ) as there,
        ):
            answer = web.Response(status=there.status, body=await there.read())
            for name in PASSED_BACK:
                if name in there.headers:
                    answer.headers.popall(name, None)
                    for value in there.headers.getall(name):
                        answer.headers.add(name, value)
            return answer


class Certificates:
    """A throw-away authority, by the openssl program, that certifies 127.0.0.1 for as long as is wanted."""

    def __init__(self, directory: Path) -> None:
        self.authority = directory / "ca.pem"
        """What a client must trust."""
        self._directory = directory
        (directory / "server.ext").write_text(
            f"subjectAltName=IP:{HOST}\nauthorityKeyIdentifier=keyid\nextendedKeyUsage=serverAuth\n"
        )
        (directory / "ca.cnf").write_text(
            "[req]\ndistinguished_name=dn\nx509_extensions=ca\nprompt=no\n[dn]\nCN=throw-away\n"
            "[ca]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\nsubjectKeyIdentifier=hash\n"
        )
        self._key = [
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-config",
            "ca.cnf",
        ]
        self._openssl("req", "-x509", *self._key, "-days", "2", "-keyout", "ca.key", "-out", "ca.pem")

    def server(self, days: int = 2) -> ssl.SSLContext:
        """A server's certificate that is valid for so many days; 0: it has just expired."""
        self._openssl("req", "-new", *self._key, "-keyout", "server.key", "-out", "server.csr")
        signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", str(days)]
        self._openssl(
            "x509", "-req", "-in", "server.csr", *signing, "-extfile", "server.ext", "-out", "server.pem"
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._directory / "server.pem", self._directory / "server.key")
        return context

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self._directory, check=True, capture_output=True)
