"""One bounded HTTP exchange with an outside party, and what its answer means for a request that was made.

A request that calls somebody must not be made twice, so this module decides three things for all adapters.
It tells truthfully whether anything was sent: only if no connection was established is it certain that
nothing was. It never repeats a request, follows a redirect (that would turn a POST into a GET, or take the
credentials elsewhere) or keeps a connection, on which a request can get lost between two answers. And what it
says, in texts and facts, holds no credential: parties quote what they were sent, and so do the errors of the
HTTP client, which name the whole URL.

It also decides, once for every page that is served here, whether whoever asks has shown the token: who may
read, who may dial and who may end a call must not depend on which page's own reading of a header was better.

It refuses to know any party's paths, bodies and logins.
"""

import base64
import binascii
import hmac
import json
import ssl
from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, quote_plus

import aiohttp
import msgspec
from msgspec import Struct
from yarl import URL

from listener.core.dialling import Cause, NotAnswered, Refused, System

REQUEST_S = 10.0
"""How long one request may take, with its connection and its answer."""

ANSWER_BYTES_MAX = 64 * 1024
"""The largest answer to a dial that is read; all that are known have less than a hundred bytes."""

SAID_CHARS_MAX = 200
"""How much of what a party said is quoted."""

SAID_BYTES_MAX = 4096
"""In how much of an answer that is looked for."""

SECRET_CHARS_MIN = 4
"""What is shorter is no secret, and hiding it would hide half of any text."""

HIDDEN = "***"

CODE_MAX = 2**63 - 1
"""A larger number is no code of anybody's."""


class Secrets:
    """What must not be said, given as values of headers or arguments; its own `repr` says nothing."""

    __slots__ = ("_spellings",)

    def __init__(self, values: Iterable[str]) -> None:
        spellings = set()
        for value in values:
            for part in (value, *_parts(value)):
                if len(part) >= SECRET_CHARS_MIN:
                    spellings |= {part, *_spellings(part)}
        # The longest first: a part of it may be another.
        self._spellings = sorted(spellings, key=lambda each: (-len(each), each))

    def hide(self, text: str) -> str:
        """The text without them, also where it ends in the middle of one."""
        for spelling in self._spellings:
            text = text.replace(spelling, HIDDEN)
        for spelling in self._spellings:
            for length in range(min(len(spelling) - 1, len(text)), SECRET_CHARS_MIN - 1, -1):
                if text.endswith(spelling[:length]):
                    text = text[:-length] + HIDDEN
                    break
        return text

    def hide_in(self, body: bytes) -> bytes:
        """A body without them, else byte for byte as it came, whatever its encoding; for what is kept."""
        return self.hide(body.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")

    def one_line(self, text: str, chars_max: int = SAID_CHARS_MAX) -> str:
        """The text to be quoted: one line of bounded length, without them, fit for a terminal, a log and a
        database."""
        line = " ".join(self.hide(text[:SAID_BYTES_MAX]).split())[:chars_max]
        return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in line)


def _spellings(secret: str) -> set[str]:
    """How a party may quote it: from the URL, or in JSON."""
    raw = secret.encode("utf-8", "surrogatepass")  # a variable of the environment may hold any bytes
    in_json = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    return {quote(raw), quote(raw, safe=""), quote_plus(raw)} | in_json


def _parts(header: str) -> list[str]:
    """The secret parts of an Authorization header: what follows the scheme, and Basic's password."""
    scheme, _, credentials = header.partition(" ")
    if not credentials:
        return []
    found = [credentials]
    if scheme.lower() == "basic":
        try:
            pair = base64.b64decode(credentials, validate=True).decode()
        except (binascii.Error, UnicodeError):
            return found
        found += [pair, pair.partition(":")[2]]
    return found


class Trouble(StrEnum):
    """Why an answer did not come, or not wholly."""

    TIMEOUT = "timeout"
    TOO_LARGE = "too large"
    BROKEN = "broken"


class Answer(Struct, frozen=True, gc=False):
    """An answer whose status came. Its `repr` is what it said, without secrets."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    """As much as came."""
    said: str
    """In one line, for errors and causes."""
    location: str = ""
    """Where a redirect leads, without secrets."""
    trouble: Trouble | None = None
    """Why the body is not whole; None: it is."""
    why: str = ""
    """The trouble in words."""

    def __repr__(self) -> str:
        return f"Answer(HTTP {self.status} {self.said})"

    def json(self) -> dict[str, Any]:
        """The fields of the object that the body is; empty where it is not whole, or is something else."""
        if self.trouble is not None:
            return {}
        try:
            fields = msgspec.json.decode(self.body)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return {}
        return fields if isinstance(fields, dict) else {}

    def integer(self, name: str) -> int | None:
        """The field if it is a whole number, as every code is; else None."""
        value = self.json().get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            return None
        return value if -CODE_MAX <= value <= CODE_MAX else None


class NoAnswer(Struct, frozen=True, gc=False):
    """No answer came. `sent` is false only if it is certain that nothing was sent."""

    sent: bool
    trouble: Trouble
    why: str


async def exchange(
    method: str,
    url: URL,
    *,
    headers: Mapping[str, str],
    secrets: Secrets,
    body: bytes = b"",
    tls: ssl.SSLContext | None = None,
    jar: aiohttp.abc.AbstractCookieJar | None = None,
    within_s: float = REQUEST_S,
    bytes_max: int = ANSWER_BYTES_MAX,
) -> Answer | NoAnswer:
    """Makes one request and takes its answer, of which no more than `bytes_max` are read, in `within_s`.

    `url` is sent as it is encoded. Without a `jar` no cookie is kept. Raises nothing but cancellation.
    """
    connected = False

    async def on_connection(_session: object, _context: SimpleNamespace, _params: object) -> None:
        nonlocal connected
        connected = True

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(on_connection)
    answer: aiohttp.ClientResponse | None = None
    chunks: list[bytes] = []
    trouble, why = None, ""
    try:
        async with (
            aiohttp.ClientSession(
                cookie_jar=jar,
                connector=aiohttp.TCPConnector(ssl=tls or True, force_close=True),
                timeout=aiohttp.ClientTimeout(total=within_s),
                trace_configs=[trace],
            ) as http,
            http.request(method, url, data=body or None, headers=headers, allow_redirects=False) as answer,
        ):
            size = 0
            async for chunk in answer.content.iter_any():
                size += len(chunk)
                if size > bytes_max:
                    trouble, why = Trouble.TOO_LARGE, f"more than {bytes_max} bytes"
                    break
                chunks.append(chunk)
    except TimeoutError:
        trouble, why = Trouble.TIMEOUT, f"no answer within {within_s:g} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        # ValueError: a host or header that cannot be.
        text = (
            error.message if isinstance(error, aiohttp.ClientResponseError) else error
        )  # the rest is the URL
        trouble, why = Trouble.BROKEN, secrets.one_line(f"{type(error).__name__}: {text}")
    if answer is None:
        return NoAnswer(connected, trouble or Trouble.BROKEN, why)
    raw = b"".join(chunks)
    said = secrets.one_line(raw[:SAID_BYTES_MAX].decode("utf-8", "replace"))
    location = secrets.one_line(answer.headers.get("Location", "")) if 300 <= answer.status < 400 else ""
    return Answer(answer.status, answer.headers, raw, said, location, trouble, why)


# ── What an answer means for a request ────────────────────────────────────────────────────────────────


def unanswered(system: System, answer: Answer | NoAnswer) -> NotAnswered:
    """The fact that no usable answer came: the request may have been carried out, unless it was not sent."""
    if isinstance(answer, NoAnswer):
        return NotAnswered(answer.sent, system, answer.why)
    said = answer.why or answer.said or "an empty answer"
    return NotAnswered(sent=True, system=system, text=f"HTTP {answer.status}: {said}")


def refusal(system: System, answer: Answer) -> Refused | NotAnswered:
    """What a status other than success says, where the body says nothing of the party's own.

    A gateway's 502 and 504 refuse nothing: the party was asked, and only its answer did not come (RFC 9110,
    15.6.3 and 15.6.5). Nor does another 5xx of GWS or Click2Dial: it says that the party broke, and no page
    says what it had done by then; a call or a record with our reference may follow. It is no specific cause
    (rule 2 of the taxonomy), and `failed` could not be corrected (rule 7): so the dial stays open until
    evidence or its deadline. Noojee's is a failure, because the taxonomy says so ("HTTP >= 300").
    """
    broke = answer.status >= 500 and system is not System.NOOJEE
    if broke or answer.status in (502, 504):
        return unanswered(system, answer)
    if answer.status in (401, 403, 407):
        return login_refused(system, f"HTTP {answer.status} {answer.said}".strip())
    text = answer.said
    if 300 <= answer.status < 400:
        text = (
            f"to {answer.location or 'nowhere'}: redirects are not followed, set base_url to where it leads"
        )
    return Refused(Cause(system, "http", str(answer.status), text))


def login_refused(system: System, text: str) -> Refused:
    """The credentials are wrong."""
    return Refused(Cause(system, "login", "", text))


# ── Who asks us ───────────────────────────────────────────────────────────────────────────────────────

_REALM = 'Bearer realm="listener"'
"""RFC 6750, section 3: the scheme is followed by at least one parameter."""


def challenge(token: str, authorization: str, instead: str = "") -> str | None:
    """None if a request shows `token`; else the WWW-Authenticate of the 401 that it must be answered with.

    `authorization` is its header of that name, empty where it has none. It shows the token by the scheme
    Bearer, in any case of letters (RFC 9110, section 11.1; RFC 6750, section 2.1). Where it is of no such
    scheme, `instead` is what counts: a token that was sent elsewhere in the request. Any text may be given;
    an empty `token` is shown by nobody.
    """
    scheme, _, credentials = authorization.partition(" ")
    given = credentials.lstrip(" ") if scheme.lower() == "bearer" else instead
    # Headers and variables may hold bytes that are no UTF-8, which Python keeps as surrogates; encoded like
    # this, no text fails and no two become the same bytes.
    shown = hmac.compare_digest(
        given.encode("utf-8", "surrogatepass"), token.encode("utf-8", "surrogatepass")
    )
    if token and shown:
        return None
    # RFC 6750, section 3.1: whoever sent no token is told no error.
    return f'{_REALM}, error="invalid_token"' if given else _REALM
