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


class Reply(msgspec.Struct, frozen=True):
    """A REST reply as it came, and when it was asked for and received."""

    asked_at: datetime
    received_at: datetime
    raw: bytes


class GenesysClient:
    """One account at one GWS. Satisfies `adapters.cometd.Credentials`; keeps no connection between requests.

    `base_url` is the server without a path, `headers` what logs the account in (Authorization: Basic or
    Bearer, or what a gateway wants), `me_path` the resource that begins the HTTP session, `snapshot_path` the
    one that lists the live calls. `wall` is the time of day.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str],
        *,
        tls: ssl.SSLContext | None = None,
        start_session: bool = False,
        me_path: str = "/api/v2/me",
        snapshot_path: str = "/api/v2/me/calls?fields=*",
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),  # noqa: TID251 - a shell's default
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._authorization = dict(headers)
        self._tls = tls
        self._start_session = start_session
        self._me_path = me_path
        self.snapshot_path = snapshot_path
        self._wall = wall
        self._csrf: dict[str, str] = {}
        self._jar = aiohttp.CookieJar(unsafe=True)  # also for hosts that are IP addresses

    @property
    def jar(self) -> aiohttp.CookieJar:
        """The account's cookies, shared by REST and CometD."""
        return self._jar

    def headers(self) -> Mapping[str, str]:
        """Authorization, and the CSRF token once it is known."""
        return {**self._authorization, **self._csrf}

    async def login(self) -> None:
        """Begins an HTTP session, and logs the agent in if the account asks for it.

        Raises `LoginRefused` if the credentials are wrong, `RemoteUnavailable` if trying again may help.
        """
        self._csrf = {}
        status, body = await self._request("GET", self._me_path)
        if status in (401, 403):
            raise LoginRefused(f"{self._base_url} refused the login: {_said(status, body)}")
        if status != 200:
            raise RemoteUnavailable(f"{self._base_url}{self._me_path}: {_said(status, body)}")
        if self._start_session:
            await self._start_contact_center_session()

    async def _start_contact_center_session(self) -> None:
        message = {"operationName": "StartContactCenterSession", "channels": ["voice"]}
        status, body = await self._request("POST", self._me_path, message)
        # statusCode 7 is partial success: some channels were started, the call channel among them or not.
        if status != 200 or _status_code(body) not in (0, 7):
            raise RemoteUnavailable(f"StartContactCenterSession: {_said(status, body)}")

    async def snapshot(self) -> Reply:
        """The live calls as GWS lists them now, exactly as it answered.

        Logs in anew if the session has expired. Raises `LoginRefused` or `RemoteUnavailable`.
        """
        asked_at = self._wall()
        status, body = await self._request("GET", self.snapshot_path)
        if status in (401, 403):
            await self.login()
            asked_at = self._wall()
            status, body = await self._request("GET", self.snapshot_path)
        if status != 200:
            raise RemoteUnavailable(f"{self._base_url}{self.snapshot_path}: {_said(status, body)}")
        return Reply(asked_at, self._wall(), body)

    async def _request(self, method: str, path: str, message: Any = None) -> tuple[int, bytes]:
        """One request; raises `RemoteUnavailable` when no answer comes."""
        url = self._base_url + path
        try:
            async with (
                aiohttp.ClientSession(
                    cookie_jar=self._jar,
                    connector=aiohttp.TCPConnector(ssl=self._tls or True),
                    timeout=aiohttp.ClientTimeout(total=REQUEST_S),
                ) as http,
                http.request(
                    method, url, json=message, headers=self.headers(), allow_redirects=False
                ) as response,
            ):
                body = await response.content.read(REPLY_BYTES_MAX)
                while len(body) < REPLY_BYTES_MAX and (chunk := await response.content.read(REPLY_BYTES_MAX)):
                    body += chunk
                if len(body) >= REPLY_BYTES_MAX:
                    raise RemoteUnavailable(f"{url}: more than {REPLY_BYTES_MAX} bytes")
                header, token = response.headers.get("X-CSRF-HEADER"), response.headers.get("X-CSRF-TOKEN")
                if header and token:
                    self._csrf = {header: token}
                return response.status, body
        except TimeoutError:
            raise RemoteUnavailable(f"{url}: no answer within {REQUEST_S:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise RemoteUnavailable(f"{url}: {type(error).__name__}: {error}") from None


def _status_code(body: bytes) -> int | None:
    """GWS' own statusCode, inside the body; None if there is none."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    code = fields.get("statusCode") if isinstance(fields, dict) else None
    return code if isinstance(code, int) else None


def _said(status: int, body: bytes) -> str:
    """An answer in one line, for an error message."""
    text = body[:200].decode("utf-8", "replace").replace("\n", " ").strip()
    return f"HTTP {status} {text}".strip()
