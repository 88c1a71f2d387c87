"""Genesys Web Services over REST: login, CSRF token, contact-centre session, snapshot of live calls.

Facts that this file rests on (GWS 8.5.2 documentation and one field capture): a GET of `/api/v2/me` with
credentials obtains the cookie JSESSIONID "that will be used by CometD for authorization"; where CSRF
protection is on, any GET returns the name of a header (`X-CSRF-HEADER`) and its value (`X-CSRF-TOKEN`) that
every PUT, POST and DELETE must carry for as long as the HTTP session lives; not being logged in is HTTP 403
with statusCode 20, not 401; HTTP 200 with statusCode 0 means "sent to a backend server" and no more.

`StartContactCenterSession` logs the agent in, visibly to the whole centre: it is sent only where the
account asks for it.
"""

import ssl
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import aiohttp
import msgspec

from listener.errors import LoginRefused, RemoteUnavailable

REQUEST_S = 10.0
"""How long one REST request may take."""

REPLY_BYTES_MAX = 16 * 1024 * 1024
"""The largest REST reply that is read; the live calls of one account are far smaller."""

SAID_BYTES_MAX = 200
"""How much of a reply is quoted in an error message."""


class Reply(msgspec.Struct, frozen=True):
    """A REST reply as it came, and when it was asked for and received."""

    asked_at: datetime
    received_at: datetime
    raw: bytes


class _Answer(msgspec.Struct, frozen=True):
    """What a request brought; `location` is where a redirect leads."""

    status: int
    body: bytes
    location: str

    @property
    def said(self) -> str:
        """In one line, for an error message."""
        text = self.body[:SAID_BYTES_MAX].decode("utf-8", "replace").replace("\n", " ").strip()
        return f"HTTP {self.status} {text}".strip()

    @property
    def status_code(self) -> int | None:
        """GWS' own statusCode, inside the body; None if there is none."""
        try:
            fields = msgspec.json.decode(self.body)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return None
        code = fields.get("statusCode") if isinstance(fields, dict) else None
        return code if isinstance(code, int) else None


class GenesysClient:
    """One account at one GWS. Satisfies `adapters.cometd.Credentials`; keeps no connection between requests.

    `base_url` is the server without a path, `headers` what logs the account in (Authorization: Basic or
    Bearer, or what a gateway wants), `me_path` the resource that begins the HTTP session, `snapshot_path` the
    one that lists the live calls. A request may take `request_s`. `wall` is the time of day.
    """

    __slots__ = (  # one for each account, of which there are thousands
        "_authorization",
        "_base_url",
        "_jar",
        "_me_path",
        "_request_s",
        "_start_session",
        "_tls",
        "_wall",
        "snapshot_path",
        "token",
    )

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        *,
        tls: ssl.SSLContext | None = None,
        start_session: bool = False,
        me_path: str = "/api/v2/me",
        snapshot_path: str = "/api/v2/me/calls?fields=*",
        request_s: float = REQUEST_S,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),  # noqa: TID251 - a shell's default
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._authorization = dict(headers)
        self._tls = tls
        self._start_session = start_session
        self._me_path = me_path
        self.snapshot_path = snapshot_path
        self._request_s = request_s
        self._wall = wall
        self.token: Mapping[str, str] = {}
        """The header with the CSRF token; empty where GWS named none."""
        self._jar = aiohttp.CookieJar(unsafe=True)  # also for hosts that are IP addresses

    @property
    def jar(self) -> aiohttp.CookieJar:
        """The account's cookies, shared by REST and CometD."""
        return self._jar

    def headers(self) -> Mapping[str, str]:
        """Authorization, and the CSRF token once it is known."""
        return {**self._authorization, **self.token}

    async def login(self) -> None:
        """Begins an HTTP session, and logs the agent in if the account asks for it.

        Raises `LoginRefused` if the credentials are wrong, `RemoteUnavailable` if trying again may help.
        """
        self.token = {}
        answer = await self._request("GET", self._me_path)
        if answer.status in (401, 403):
            raise LoginRefused(
                f"{self._base_url} refused the login: {answer.said}; "
                "check the account's login and password (or token), then reload"
            )
        if answer.status != 200:
            raise self._unavailable(self._me_path, answer)
        if self._start_session:
            await self._start_contact_center_session()

    async def _start_contact_center_session(self) -> None:
        message = {"operationName": "StartContactCenterSession", "channels": ["voice"]}
        answer = await self._request("POST", self._me_path, message)
        # statusCode 7 is partial success: some channel did not start, and what can be heard is heard.
        if answer.status != 200 or answer.status_code not in (0, 7):
            raise RemoteUnavailable(
                f"{self._base_url}: StartContactCenterSession: {answer.said}; "
                "it is tried again: see whether the agent may log in, or listen without logging it in"
            )

    async def snapshot(self) -> Reply:
        """The live calls as GWS lists them now, exactly as it answered.

        Logs in anew if the session has expired. Raises `LoginRefused` or `RemoteUnavailable`.
        """
        asked_at = self._wall()
        answer = await self._request("GET", self.snapshot_path)
        if answer.status in (401, 403):
            await self.login()
            asked_at = self._wall()
            answer = await self._request("GET", self.snapshot_path)
        if answer.status != 200:
            raise self._unavailable(self.snapshot_path, answer)
        return Reply(asked_at, self._wall(), answer.body)

    def _unavailable(self, path: str, answer: _Answer) -> RemoteUnavailable:
        """What a status other than 200 means, and what to do."""
        url = self._base_url + path
        if 300 <= answer.status < 400:
            return RemoteUnavailable(
                f"{url}: HTTP {answer.status} to {answer.location}: redirects are not followed, "
                "set base_url to where it leads, or give the headers that it wants"
            )
        if 400 <= answer.status < 500:
            return RemoteUnavailable(f"{url}: {answer.said}; check base_url and the path")
        return RemoteUnavailable(f"{url}: {answer.said}; it is tried again, as often as it takes")

    async def _request(self, method: str, path: str, message: Any = None) -> _Answer:
        """One request; raises `RemoteUnavailable` when no answer comes."""
        url = self._base_url + path
        try:
            async with (
                aiohttp.ClientSession(
                    cookie_jar=self._jar,
                    connector=aiohttp.TCPConnector(ssl=self._tls or True),
                    timeout=aiohttp.ClientTimeout(total=self._request_s),
                ) as http,
                # A redirect would turn a POST into a GET, or take the credentials elsewhere.
                http.request(
                    method, url, json=message, headers=self.headers(), allow_redirects=False
                ) as response,
            ):
                body = await _read(response, url)
                header, token = response.headers.get("X-CSRF-HEADER"), response.headers.get("X-CSRF-TOKEN")
                if header and token:
                    self.token = {header: token}
                return _Answer(response.status, body, response.headers.get("Location", "nowhere"))
        except TimeoutError:
            raise RemoteUnavailable(
                f"{url}: no answer within {self._request_s:g} s; "
                "check base_url, the network, and whether GWS is overloaded"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise RemoteUnavailable(
                f"{url}: {type(error).__name__}: {error}; check base_url, the network, and ca_file for TLS"
            ) from None


async def _read(response: aiohttp.ClientResponse, url: str) -> bytes:
    """The body; raises `RemoteUnavailable` where it is too large."""
    chunks = []
    size = 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > REPLY_BYTES_MAX:
            raise RemoteUnavailable(
                f"{url}: more than {REPLY_BYTES_MAX} bytes; ask for fewer fields (snapshot_path)"
            )
    return b"".join(chunks)
