"""The exam of the dialling adapters: whatever a party does, one fact, one request, and no credential told.

Each adapter passes the same exam against a real server on loopback that plays its party. A row says what the
party does and what must be known afterwards. Three things hold in every row: the fact is exactly this one;
the request that asks for a call was seen at most once (exactly once if anything was sent), since a second one
would call somebody twice; and no credential stands in the fact, the log, what was printed, or a `repr`.
"""

import asyncio
import base64
import contextlib
import json
import logging
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from aiohttp import web
from msgspec import structs

from listener.adapters.click2dial import Click2Dial
from listener.adapters.exchange import ANSWER_BYTES_MAX
from listener.adapters.genesys import GenesysClient
from listener.adapters.noojee import Noojee
from listener.core.dialling import (
    Accepted,
    CallRecord,
    Cause,
    NotAnswered,
    Outcome,
    Refused,
    System,
    advance,
    placed,
)
from listener.core.requests import (
    Acknowledgement,
    Click2DialCall,
    GwsDial,
    GwsPreviewDial,
    NoojeeDial,
    Request,
    build,
)
from tests.adapters.test_genesys import times
from tests.peers.proxy import HOST, free_port
from tests.support.gateway import Certificates
from tests.support.party import Handler, cut, party, says

SECRET = "k3y/with+odd&signs and blanks"
BASIC = base64.b64encode(f"agent5001:{SECRET}".encode()).decode()
REQUEST_S = 5.0
SHORT_S = 0.5
"""How long a party that never answers is waited for."""


@dataclass(frozen=True)
class Examinee:
    """One adapter, a request to it, and how its party says yes and no."""

    system: System
    request: Request
    make: Callable[..., Any]
    yes: str
    accepted: Accepted
    no: tuple[int, str]
    refused: Refused
    by_status: bool = False
    """HTTP 2xx is yes, whatever the body."""

    async def dial(self, url: str, tls: ssl.SSLContext | None = None, request_s: float = REQUEST_S) -> Any:
        """Makes the adapter and dials once."""
        adapter = self.make(url, tls, request_s)
        fact = await adapter.dial(self.request)
        assert_no_secret(repr(adapter), str(adapter), repr(fact), str(fact))
        return fact

    @property
    def path(self) -> str:
        """Where the dial is asked for."""
        return build(self.request).path


def _gws(url: str, tls: ssl.SSLContext | None, request_s: float) -> GenesysClient:
    return GenesysClient(url, {"Authorization": f"Basic {BASIC}"}, tls=tls, request_s=request_s)


def _noojee(url: str, tls: ssl.SSLContext | None, request_s: float) -> Noojee:
    return Noojee(url, SECRET, tls=tls, request_s=request_s)


def _click2dial(url: str, tls: ssl.SSLContext | None, request_s: float) -> Click2Dial:
    return Click2Dial(url, {"Authorization": f"Bearer {SECRET}"}, tls=tls, request_s=request_s)


_UNREGISTERED = (500, '{"statusCode": 4, "statusMessage": "Device \'6001\' is not registered."}')
_UNREGISTERED_FACT = Refused(Cause(System.GWS, "statusCode", "4", "Device '6001' is not registered."))

EXAMINEES = {
    "gws": Examinee(
        System.GWS,
        GwsDial(number="6002", device="d-1"),
        _gws,
        '{"statusCode": 0}',
        Accepted(),
        _UNREGISTERED,
        _UNREGISTERED_FACT,
    ),
    "gws preview": Examinee(
        System.GWS,
        GwsPreviewDial(device_path="/devices/d-1", outbound_record={"phoneNumber": "6002"}),
        _gws,
        '{"statusCode": 0}',
        Accepted(),
        _UNREGISTERED,
        _UNREGISTERED_FACT,
    ),
    "noojee": Examinee(
        System.NOOJEE,
        NoojeeDial(number="0383200000", exten_or_unique_id="SIP/201"),
        _noojee,
        '{"SessionID": 41, "Message": "Originate successfully queued", "Code": 0}',
        Accepted("41"),
        (200, '{"Message": "No such extension", "Code": -3}'),
        Refused(Cause(System.NOOJEE, "Code", "-3", "No such extension")),
    ),
    "click2dial": Examinee(
        System.CLICK2DIAL,
        Click2DialCall(agent="201", callee="0820001234", outbound_id="27110001234", reference="r-1"),
        _click2dial,
        "",
        Accepted(),
        (400, "outbound_id is not allowed"),
        Refused(Cause(System.CLICK2DIAL, "http", "400", "outbound_id is not allowed")),
        by_status=True,
    ),
}


@pytest.fixture(params=EXAMINEES)
def examinee(request: pytest.FixtureRequest) -> Examinee:
    """Each of them in turn."""
    return EXAMINEES[request.param]


def assert_no_secret(*texts: str) -> None:
    """No credential stands there, in whichever spelling."""
    for text in texts:
        for spelling in (SECRET, quote(SECRET), quote(SECRET, safe=""), quote_plus(SECRET), BASIC):
            assert spelling not in text


@pytest.fixture(autouse=True)
def nothing_is_told(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Neither the log of any library nor the terminal shows a credential."""
    caplog.set_level(logging.DEBUG)
    yield
    printed = capsys.readouterr()
    assert_no_secret(caplog.text, printed.out, printed.err)
    assert_no_secret(*(repr(record.__dict__) for record in caplog.records))


async def never(_: web.Request) -> web.StreamResponse:
    """Nothing, for ever."""
    await asyncio.Event().wait()
    raise AssertionError


async def half_a_body_and_nothing(request: web.Request) -> web.StreamResponse:
    """A status and half an answer, for ever."""
    response = web.StreamResponse(headers={"Content-Length": "100"})
    await response.prepare(request)
    await response.write(b'{"statusCode": 0, "Code": 0')
    await asyncio.Event().wait()
    return response


async def huge(request: web.Request) -> web.StreamResponse:
    """The right answer, and then more than is read."""
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):  # nobody reads to the end
        await response.write(b'{"statusCode": 0, "Code": 0}')
        for _ in range(20):
            await response.write(b" " * ANSWER_BYTES_MAX)
    return response


def unanswered(examinee: Examinee, *, sent: bool = True) -> NotAnswered:
    """The fact that no usable answer came."""
    return NotAnswered(sent=sent, system=examinee.system)


def refused(examinee: Examinee, field: str, code: str) -> Refused:
    """The fact that it was refused."""
    return Refused(Cause(examinee.system, field, code))


def without_text(fact: Acknowledgement) -> tuple[Acknowledgement, str]:
    """The fact, and apart from it the party's words."""
    if isinstance(fact, Accepted):
        return fact, ""
    if isinstance(fact, NotAnswered):
        return structs.replace(fact, text=""), fact.text
    return Refused(structs.replace(fact.cause, text="")), fact.cause.text


# ── Yes and no ────────────────────────────────────────────────────────────────────────────────────────


async def test_yes(examinee: Examinee) -> None:
    """What the party says when it has taken a dial, and the request is the one of the table."""
    bodies: list[bytes] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.read())
        assert request.content_type == build(examinee.request).content_type
        return await says(200, examinee.yes)(request)

    async with party(handler) as there:
        assert await examinee.dial(there.url) == examinee.accepted
    built = build(examinee.request)
    key = f"&apiKey={quote_plus(SECRET)}" if examinee.system is System.NOOJEE else ""
    assert there.seen == [("POST", built.target + key)]
    assert bodies == [built.body]


async def test_yes_over_tls_with_a_private_authority(examinee: Examinee, tmp_path: Path) -> None:
    """The environment's own authority is trusted."""
    authority = Certificates(tmp_path)
    tls = ssl.create_default_context(cafile=str(authority.authority))
    async with party(says(200, examinee.yes), authority.server()) as there:
        assert await examinee.dial(there.url, tls) == examinee.accepted
        assert there.posts(examinee.path) == 1


async def test_a_slow_yes(examinee: Examinee) -> None:
    """An answer that takes its time, piece by piece, is taken if it is whole within the bound."""

    async def handler(request: web.Request) -> web.StreamResponse:
        raw = examinee.yes.encode()
        response = web.StreamResponse(headers={"Content-Length": str(len(raw))})
        await response.prepare(request)
        for at in range(len(raw)):
            await response.write(raw[at : at + 1])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), 0.002)
        return response

    async with party(handler) as there:
        assert await examinee.dial(there.url) == examinee.accepted
        assert there.posts(examinee.path) == 1


async def test_no(examinee: Examinee) -> None:
    """What the party says when it refuses, word for word, and the dial fails with it."""
    async with party(says(*examinee.no)) as there:
        fact = await examinee.dial(there.url)
        assert there.posts(examinee.path) == 1
    assert fact == examinee.refused
    clock = times()
    dial = placed("d", 1, examinee.system, "6002", next(clock))
    assert advance(dial, fact, next(clock)).dial.outcome is Outcome.FAILED


@pytest.mark.parametrize("status", [400, 404, 429])
async def test_no_by_status(examinee: Examinee, status: int) -> None:
    """Where the body says nothing of the party's own, the status does."""
    async with party(says(status, "<html>\n<b>Not\nnow</b>", "text/html")) as there:
        fact, text = without_text(await examinee.dial(there.url))
        assert there.posts(examinee.path) == 1
    assert fact == refused(examinee, "http", str(status))
    assert text == "<html> <b>Not now</b>"


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_a_party_that_broke_said_neither(examinee: Examinee, status: int) -> None:
    """It may have dialled before it broke: what is heard later decides. Only of Noojee the taxonomy says that
    its own error is a failure."""
    async with party(says(status, "<html>\n<b>Not\nnow</b>", "text/html")) as there:
        fact, text = without_text(await examinee.dial(there.url))
        assert there.posts(examinee.path) == 1
    if examinee.system is System.NOOJEE and status not in (502, 504):
        assert fact == refused(examinee, "http", str(status))
        return
    assert fact == NotAnswered(sent=True, system=examinee.system)
    assert text == f"HTTP {status}: <html> <b>Not now</b>"
    clock = times()
    dial = placed("d", 1, examinee.system, "6002", next(clock), reference="r-1")
    waits = advance(dial, fact, next(clock)).dial
    assert waits.outcome is None
    record = CallRecord("busy", "17", 0.0)
    assert advance(waits, record, next(clock)).dial.outcome is Outcome.BUSY


@pytest.mark.parametrize("status", [401, 403])
async def test_wrong_credentials(examinee: Examinee, status: int) -> None:
    """The login is refused: GWS is asked to log in once, and not to dial again."""
    async with party(says(status, '{"statusCode": 20, "statusMessage": "Access denied"}')) as there:
        fact, text = without_text(await examinee.dial(there.url))
        assert there.posts(examinee.path) == 1
        logins = [target for method, target in there.seen if method == "GET"]
    assert fact == refused(examinee, "login", "")
    assert f"HTTP {status}" in text
    assert "Access denied" in text
    assert logins == (["/api/v2/me"] if examinee.system is System.GWS else [])
    clock = times()
    dial = placed("d", 1, examinee.system, "6002", next(clock))
    assert advance(dial, await _same(fact), next(clock)).dial.outcome is Outcome.NOT_ALLOWED


async def _same(fact: Any) -> Any:
    return fact


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(examinee: Examinee, status: int) -> None:
    """Nobody else hears of the dial or the credentials, not even in the fact, which tells where it led."""
    async with party(says(200, examinee.yes)) as other:

        async def handler(request: web.Request) -> web.StreamResponse:
            # As a server does that wants TLS: the whole URL again, with what stands in it.
            where = f"{other.url}{request.rel_url.raw_path_qs}"
            return web.Response(status=status, headers={"Location": where})

        async with party(handler) as there:
            fact, text = without_text(await examinee.dial(there.url))
            assert there.posts(examinee.path) == 1
            assert len(there.seen) == 1
        assert other.seen == []
    assert fact == refused(examinee, "http", str(status))
    assert text.startswith(f"to {other.url}/")
    assert "redirects are not followed" in text


# ── No answer ─────────────────────────────────────────────────────────────────────────────────────────

YES = b'{"statusCode": 0, "SessionID": 41, "Message": "Originate successfully queued", "Code": 0}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(YES)

NO_ANSWER: dict[str, tuple[Handler, str]] = {
    "never": (never, f"no answer within {SHORT_S:g} s"),
    "cut before the answer": (cut(b""), "ServerDisconnectedError"),
    "cut in the status line": (cut(HEAD[:12]), ""),
    "cut in the headers": (cut(HEAD[:40]), ""),
    "no HTTP": (cut(b"220 smtp.example.com ESMTP\r\n"), "ClientResponseError"),
    "gateway without answer": (says(504, "upstream timed out", "text/plain"), "HTTP 504: upstream timed out"),
    "gateway with a bad one": (says(502, "", "text/plain"), "HTTP 502: an empty answer"),
}


@pytest.mark.parametrize("name", NO_ANSWER)
async def test_no_answer(examinee: Examinee, name: str) -> None:
    """It may have been dialled, and it is not asked for again."""
    handler, words = NO_ANSWER[name]
    async with party(handler) as there:
        wait_s = SHORT_S if handler is never else REQUEST_S
        fact, text = without_text(await examinee.dial(there.url, request_s=wait_s))
        assert there.posts(examinee.path) == 1
        assert len(there.seen) == 1
    assert fact == unanswered(examinee)
    assert words in text
    assert text != ""
    clock = times()
    dial = placed("d", 1, examinee.system, "6002", next(clock))
    assert advance(dial, NotAnswered(sent=True, system=examinee.system), next(clock)).dial.outcome is None


NO_USE: dict[str, tuple[Handler, str]] = {
    "half a body": (cut(HEAD + YES[:30]), "HTTP 200: ClientPayloadError"),
    "half a body, for ever": (half_a_body_and_nothing, "HTTP 200: no answer within"),
    "HTML": (says(200, "<html>Please log in</html>", "text/html"), "HTTP 200: <html>Please log in</html>"),
    "empty": (says(200, ""), "HTTP 200: an empty answer"),
    "a list": (says(200, "[0]"), "HTTP 200: [0]"),
    "a number": (says(200, "0"), "HTTP 200: 0"),
    "other fields": (says(200, '{"status": 0}'), "HTTP 200"),
    "a code that is a text": (says(200, '{"statusCode": "0", "Code": "0"}'), "HTTP 200"),
    "a code that is true": (says(200, '{"statusCode": false, "Code": false}'), "HTTP 200"),
    "a code beyond numbers": (says(200, '{"statusCode": 1e999, "Code": 1e999}'), "HTTP 200"),
    "a code of many digits": (says(200, f'{{"statusCode": {"9" * 5000}, "Code": {"9" * 5000}}}'), "HTTP 200"),
    "a code beyond 64 bits": (says(200, f'{{"statusCode": {10**30}, "Code": {10**30}}}'), "HTTP 200"),
    "less than announced": (cut(HEAD.replace(b"Length: ", b"Length: 9") + YES), "ClientPayloadError"),
    "half a JSON": (says(200, '{"statusCode": 0, "Code": 0'), "HTTP 200"),
    "deep": (says(200, '{"Code": ' + "[" * 30_000), "HTTP 200"),
    "no UTF-8": (cut(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n" + b'{"Code":"\xff"}'), "HTTP 200"),
    "huge": (huge, f"HTTP 200: more than {ANSWER_BYTES_MAX} bytes"),
}


@pytest.mark.parametrize("name", NO_USE)
async def test_an_answer_of_no_use(examinee: Examinee, name: str) -> None:
    """What says neither yes nor no is no answer, but where the status alone is one (Click2Dial)."""
    handler, words = NO_USE[name]
    async with party(handler) as there:
        fact, text = without_text(
            await examinee.dial(there.url, request_s=SHORT_S if "for ever" in name else REQUEST_S)
        )
        assert there.posts(examinee.path) == 1
        assert len(there.seen) == 1
    if examinee.by_status:
        assert fact == Accepted()
    else:
        assert fact == unanswered(examinee)
        assert words in text
        assert len(text) < 300
        assert text.isprintable()


async def test_no_is_no_although_its_words_are_cut(examinee: Examinee) -> None:
    """The status came: that much is known."""
    async with party(cut(b"HTTP/1.1 400 Oops\r\nContent-Length: 100\r\n\r\n<html>")) as there:
        fact, text = without_text(await examinee.dial(there.url))
        assert there.posts(examinee.path) == 1
    assert fact == refused(examinee, "http", "400")
    assert text == "<html>"


async def test_a_connection_that_is_reset_at_once(examinee: Examinee) -> None:
    """It was established, so something may have been sent: nobody can tell what the other side has read."""

    async def reset(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw: socket.socket = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connections.append(writer)
        writer.close()

    connections: list[asyncio.StreamWriter] = []
    async with await asyncio.start_server(reset, HOST, 0) as server:
        port = server.sockets[0].getsockname()[1]
        fact, text = without_text(await examinee.dial(f"http://{HOST}:{port}"))
    assert fact == unanswered(examinee)
    assert text != ""
    assert len(connections) == 1


# ── Nothing sent ──────────────────────────────────────────────────────────────────────────────────────


async def test_nobody_there(examinee: Examinee) -> None:
    """A refused connection: certainly nothing was sent, and the dial has failed."""
    fact, text = without_text(await examinee.dial(f"http://{HOST}:{free_port()}"))
    assert fact == unanswered(examinee, sent=False)
    assert "Cannot connect" in text
    clock = times()
    dial = placed("d", 1, examinee.system, "6002", next(clock))
    after = advance(dial, NotAnswered(sent=False, system=examinee.system), next(clock)).dial
    assert after.outcome is Outcome.FAILED


async def test_a_name_that_nobody_knows(examinee: Examinee) -> None:
    """DNS has no such host."""
    fact, text = without_text(await examinee.dial("http://no-such-host.invalid"))
    assert fact == unanswered(examinee, sent=False)
    assert "no-such-host.invalid" in text


async def test_a_certificate_of_nobody_we_trust(examinee: Examinee, tmp_path: Path) -> None:
    """TLS failed: the party has seen no request."""
    authority = Certificates(tmp_path)
    async with party(says(200, examinee.yes), authority.server()) as there:
        fact, text = without_text(await examinee.dial(there.url))
        assert there.seen == []
    assert fact == unanswered(examinee, sent=False)
    assert "CERTIFICATE_VERIFY_FAILED" in text


async def test_tls_with_a_party_that_has_none(examinee: Examinee) -> None:
    """Nor does a handshake that fails send anything."""
    async with party(says(200, examinee.yes)) as there:
        fact, _ = without_text(await examinee.dial(f"https://{HOST}:{there.port}"))
        assert there.seen == []
    assert fact == unanswered(examinee, sent=False)


async def test_a_handshake_that_never_ends(examinee: Examinee) -> None:
    """The time is over before there is a connection."""
    done = asyncio.Event()

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await done.wait()
        writer.close()

    async with await asyncio.start_server(silent, HOST, 0) as server:
        port = server.sockets[0].getsockname()[1]
        fact, text = without_text(await examinee.dial(f"https://{HOST}:{port}", request_s=SHORT_S))
        done.set()
    assert fact == unanswered(examinee, sent=False)
    assert text == f"no answer within {SHORT_S:g} s"


# ── Credentials ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [200, 400, 401, 500, 502])
@pytest.mark.parametrize("form", ["text", "json", "cut"])
async def test_a_party_that_quotes_what_it_was_sent(examinee: Examinee, status: int, form: str) -> None:
    """Error pages show the URL and the headers of the request: they are quoted without the credentials."""

    async def handler(request: web.Request) -> web.StreamResponse:
        quoted = f"{request.rel_url.raw_path_qs} {request.headers.get('Authorization', '')} {SECRET}"
        body = {
            "text": quoted,
            "json": json.dumps({"Code": -1, "statusCode": 4, "Message": quoted, "statusMessage": quoted}),
            "cut": f"x {SECRET[:-3]}",
        }[form]
        return web.Response(status=status, text=body)

    async with party(handler) as there:
        fact, text = without_text(await examinee.dial(there.url))
        assert there.posts(examinee.path) == 1
    if not isinstance(fact, Accepted):
        assert "***" in text
        assert SECRET[:-3] not in text


async def test_a_dial_that_is_given_up_is_cancelled(examinee: Examinee) -> None:
    """Cancellation is obeyed, and is no fact."""
    arrived = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        arrived.set()
        return await never(request)

    async with party(handler) as there, asyncio.timeout(5):
        dial = asyncio.get_running_loop().create_task(examinee.dial(there.url))
        await arrived.wait()
        dial.cancel()
        await asyncio.wait({dial})
        assert dial.cancelled()
        assert there.posts(examinee.path) == 1
