"""Genesys Web Services over REST: login, CSRF token, contact-centre session, snapshot of live calls, dials.

Facts that this file rests on (GWS 8.5.2 documentation and one field capture): a GET of `/api/v2/me` with
credentials obtains the cookie JSESSIONID "that will be used by CometD for authorization"; where CSRF
protection is on, any GET returns the name of a header (`X-CSRF-HEADER`) and its value (`X-CSRF-TOKEN`) that
every PUT, POST and DELETE must carry for as long as the HTTP session lives; not being logged in is HTTP 403
with statusCode 20, not 401; HTTP 200 with statusCode 0 means "sent to a backend server" and no more; a
back-end that refuses is HTTP 500 with statusCode 4 ("Device '5001' is not registered.").

`StartContactCenterSession` logs the agent in, visibly to the whole centre: it is sent only where the
account asks for it. A dial that was refused because the session or its token had expired was not carried
out, and is sent once more after a login; one that may have been carried out is never sent again.
"""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import aiohttp
import msgspec
from msgspec import structs
from yarl import URL

from listener.adapters.exchange import (
    ANSWER_BYTES_MAX,
    REQUEST_S,
    Answer,
    NoAnswer,
    Secrets,
    Trouble,
    exchange,
    login_refused,
    refusal,
    unanswered,
)
from listener.core.dialling import Accepted, Cause, NotAnswered, Refused, System
from listener.core.requests import JSON_TYPE, Acknowledgement, GwsDial, GwsPreviewDial, HttpRequest, build
from listener.errors import InvalidRequest, LoginRefused, RemoteUnavailable

REPLY_BYTES_MAX = 16 * 1024 * 1024
"""The largest REST reply that is read; the live calls of one account are far smaller."""

DEVICES_PATH = "/api/v2/me/devices?fields=*"
"""The account's devices, with their ids and numbers."""

DEVICES_SHOWN_MAX = 10
"""So many of an account's devices are named when one must be chosen."""

DEVICES_CHARS_MAX = 600
"""How long that may get: ids are UUIDs."""

INCOMPLETE = (7, 9)
"""statusCodes of partial success and of processing that is not complete: neither yes nor no."""

NOT_AUTHENTICATED = 20
"""The statusCode of a request without a login."""


_CURES = {
    Trouble.TIMEOUT: "check base_url, the network, and whether GWS is overloaded",
    Trouble.TOO_LARGE: "ask for fewer fields (snapshot_path)",
    Trouble.BROKEN: "check base_url, the network, and ca_file for TLS",
}


class Reply(msgspec.Struct, frozen=True):
    """A REST reply as it came, and when it was asked for and received."""

    asked_at: datetime
    received_at: datetime
    raw: bytes


class Device(msgspec.Struct, frozen=True):
    """A telephone of the account."""

    id: str
    phone_number: str


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
                f"{self._base_url} refused the login: {_said(answer)}; "
                "check the account's login and password (or token), then reload"
            )
        if answer.status != 200:
            raise self._unavailable(self._me_path, answer)
        if self._start_session:
            await self._start_contact_center_session()

    async def _start_contact_center_session(self) -> None:
        message = {"operationName": "StartContactCenterSession", "channels": ["voice"]}
        answer = await self._request("POST", self._me_path, msgspec.json.encode(message))
        # statusCode 7 is partial success: some channel did not start, and what can be heard is heard.
        if answer.status != 200 or answer.integer("statusCode") not in (0, 7):
            raise RemoteUnavailable(
                f"{self._base_url}: StartContactCenterSession: {_said(answer)}; "
                "it is tried again: see whether the agent may log in, or listen without logging it in"
            )

    async def snapshot(self) -> Reply:
        """The live calls as GWS lists them now, exactly as it answered.

        Logs in anew if the session has expired. Raises `LoginRefused` or `RemoteUnavailable`.
        """
        return await self._get(self.snapshot_path)

    async def devices(self) -> tuple[Device, ...]:
        """The account's devices as GWS lists them. Raises as `snapshot`."""
        raw = (await self._get(DEVICES_PATH)).raw
        try:
            return tuple(
                [
                    Device(each.id, each.phoneNumber)
                    for each in msgspec.json.decode(raw, type=_Devices).devices
                ]
            )
        except (msgspec.MsgspecError, UnicodeError):
            raise RemoteUnavailable(
                f"{self._base_url}{DEVICES_PATH}: no list of devices; name the device to dial from"
            ) from None

    async def dial(self, request: GwsDial | GwsPreviewDial) -> Acknowledgement:
        """Asks for a call, by the account's only device where the request names none. Never raises.

        Takes at most four times `request_s`: finding the device, asking, logging in anew, asking again. Tells
        what was said to the last request that asked for the call.
        """
        try:
            async with asyncio.timeout(self._request_s):
                request = await self._with_device(request)
        except TimeoutError:
            text = (
                f"{self._base_url}: no device found within {self._request_s:g} s; name the one to dial from"
            )
            return NotAnswered(sent=False, system=System.GWS, text=text)
        except InvalidRequest as error:
            return Refused(Cause(System.GWS, "validation", error.argument, str(error)))
        except LoginRefused as error:
            return login_refused(System.GWS, str(error))
        except RemoteUnavailable as error:
            return NotAnswered(sent=False, system=System.GWS, text=str(error))
        built = build(request)
        answer = await self._post(built)
        if isinstance(answer, Answer) and _denied(answer):
            try:
                async with asyncio.timeout(self._request_s):
                    await self.login()
            except LoginRefused as error:
                return login_refused(System.GWS, str(error))
            except (RemoteUnavailable, TimeoutError):
                return _acknowledgement(answer, self._secrets())
            answer = await self._post(built)
        return _acknowledgement(answer, self._secrets())

    async def _with_device(self, request: GwsDial | GwsPreviewDial) -> GwsDial | GwsPreviewDial:
        """The request with its device; raises `InvalidRequest` if it is not clear which."""
        if isinstance(request, GwsDial):
            if request.device is not None:
                return request
            return structs.replace(request, device=await self._only_device())
        if request.device_path is not None:
            return request
        return structs.replace(request, device_path=f"/devices/{await self._only_device()}")

    async def _only_device(self) -> str:
        devices = await self.devices()
        if len(devices) == 1:
            return devices[0].id
        if not devices:
            raise InvalidRequest("device", "the account has none", "give it one, or dial by another account")
        shown = ", ".join(f"{each.id} ({each.phone_number})" for each in devices[:DEVICES_SHOWN_MAX])
        more = ", …" if len(devices) > DEVICES_SHOWN_MAX else ""
        cure = f"name one of them: {self._secrets().one_line(shown, DEVICES_CHARS_MAX)}{more}"
        raise InvalidRequest("device", f"the account has {len(devices)}", cure)

    async def _get(self, path: str) -> Reply:
        """What is at the path; logs in anew if the session has expired."""
        asked_at = self._wall()
        answer = await self._request("GET", path)
        if answer.status in (401, 403):
            await self.login()
            asked_at = self._wall()
            answer = await self._request("GET", path)
        if answer.status != 200:
            raise self._unavailable(path, answer)
        return Reply(asked_at, self._wall(), answer.body)

    def _unavailable(self, path: str, answer: Answer) -> RemoteUnavailable:
        """What a status other than 200 means, and what to do."""
        url = self._base_url + path
        if 300 <= answer.status < 400:
            return RemoteUnavailable(
                f"{url}: HTTP {answer.status} to {answer.location or 'nowhere'}: redirects are not followed, "
                "set base_url to where it leads, or give the headers that it wants"
            )
        if 400 <= answer.status < 500:
            return RemoteUnavailable(f"{url}: {_said(answer)}; check base_url and the path")
        return RemoteUnavailable(f"{url}: {_said(answer)}; it is tried again, as often as it takes")

    async def _request(self, method: str, path: str, body: bytes = b"") -> Answer:
        """One request and its whole answer; raises `RemoteUnavailable` when none comes."""
        url = self._base_url + path
        answer = await self._exchange(method, URL(url), body, REPLY_BYTES_MAX)
        if isinstance(answer, Answer) and answer.trouble is None:
            return answer
        cure = _CURES[answer.trouble or Trouble.BROKEN]
        raise RemoteUnavailable(f"{url}: {answer.why}; {cure}")

    async def _post(self, built: HttpRequest) -> Answer | NoAnswer:
        """Asks for a call."""
        url = URL(self._base_url + built.target, encoded=True)
        return await self._exchange(built.method, url, built.body, ANSWER_BYTES_MAX)

    async def _exchange(self, method: str, url: URL, body: bytes, bytes_max: int) -> Answer | NoAnswer:
        answer = await exchange(
            method,
            url,
            headers={**self.headers(), **({"Content-Type": JSON_TYPE} if body else {})},
            secrets=self._secrets(),
            body=body,
            tls=self._tls,
            jar=self._jar,
            within_s=self._request_s,
            bytes_max=bytes_max,
        )
        if isinstance(answer, Answer):
            header, token = answer.headers.get("X-CSRF-HEADER"), answer.headers.get("X-CSRF-TOKEN")
            if header and token:
                self.token = {header: token}
        return answer

    def _secrets(self) -> Secrets:
        return Secrets(self.headers().values())


class _DeviceFields(msgspec.Struct):
    id: str
    phoneNumber: str = ""  # noqa: N815 - Genesys' spelling


class _Devices(msgspec.Struct):
    devices: list[_DeviceFields]


def _said(answer: Answer) -> str:
    """In one line, for an error message."""
    return f"HTTP {answer.status} {answer.said}".strip()


def _denied(answer: Answer) -> bool:
    """Whether the session, or its token, has expired, so that the request was not carried out."""
    return answer.status in (401, 403) or answer.integer("statusCode") == NOT_AUTHENTICATED


def _acknowledgement(answer: Answer | NoAnswer, secrets: Secrets) -> Acknowledgement:
    """What was said to a dial. GWS' own statusCode comes before the HTTP status, which says less."""
    if isinstance(answer, NoAnswer):
        return unanswered(System.GWS, answer)
    code, message = answer.integer("statusCode"), answer.json().get("statusMessage")
    if code == NOT_AUTHENTICATED:
        return login_refused(System.GWS, _said(answer))
    if code is not None and code not in (0, *INCOMPLETE):
        text = secrets.one_line(message) if isinstance(message, str) else ""
        return Refused(Cause(System.GWS, "statusCode", str(code), text))
    if answer.status >= 300:
        return refusal(System.GWS, answer)
    return Accepted() if code == 0 else unanswered(System.GWS, answer)
