"""GWS over REST: the login and what it leaves behind, and how it says that it cannot.

What GWS itself does is played by the simulator, on a real socket. What no GWS should do (answers that are
too large, too late, cut, or lead elsewhere) comes from applications of a few lines.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from listener.adapters.genesys import REPLY_BYTES_MAX, Device, GenesysClient
from listener.core.dialling import Accepted, Cause, NotAnswered, Refused, System
from listener.core.requests import GwsDial, GwsPreviewDial
from listener.errors import LoginRefused, RemoteUnavailable
from listener.simulator.centre import Simulator
from listener.simulator.gws import Account
from listener.simulator.settings import SimulatorSettings
from tests.peers.proxy import HOST, free_port

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SECRET = "correct horse battery staple"
DENIED = {"statusCode": 20, "statusMessage": "Access denied"}


@contextlib.asynccontextmanager
async def gws(**settings: Any) -> AsyncIterator[tuple[Simulator, Account]]:
    """A simulated contact centre with one account."""
    async with Simulator(SimulatorSettings(accounts=1, password=SECRET, **settings)) as simulator:
        (account,) = simulator.accounts.values()
        yield simulator, account


def client(simulator: Simulator, account: Account, *, password: str = SECRET, **more: Any) -> GenesysClient:
    """A client with the account's Basic login."""
    basic = aiohttp.encode_basic_auth(account.login, password)
    return GenesysClient(simulator.url, {"Authorization": basic}, **more)


@contextlib.asynccontextmanager
async def answering(handler: Handler) -> AsyncIterator[tuple[str, list[web.Request]]]:
    """A server that answers everything so; gives its URL, and the requests as they come."""
    requests: list[web.Request] = []

    async def watch(request: web.Request) -> web.StreamResponse:
        requests.append(request)
        return await handler(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", watch)
    runner = web.AppRunner(
        app, handle_signals=False, access_log=None, shutdown_timeout=0.1, handler_cancellation=True
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, 0).start()
        yield f"http://{HOST}:{runner.addresses[0][1]}", requests
    finally:
        await runner.cleanup()


def gws_answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON answer."""
    return web.Response(
        body=json.dumps(body).encode(), status=status, headers=headers, content_type="application/json"
    )


def times() -> Iterator[datetime]:
    """A wall clock that strikes the next second whenever it is looked at."""
    at = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)
    while True:
        yield at
        at += timedelta(seconds=1)


# ── Login ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_login_keeps_the_cookie_of_the_session() -> None:
    """JSESSIONID, "that will be used by CometD for authorization", is kept also for an IP address."""
    async with gws() as (simulator, account):
        session = client(simulator, account)
        await session.login()
    cookies = {cookie.key: cookie.value for cookie in session.jar}
    assert set(cookies) == {"JSESSIONID"}
    assert HOST in simulator.url


async def test_the_cookie_is_sent_again() -> None:
    """One HTTP session serves all that follows."""

    async def answer(request: web.Request) -> web.Response:
        response = gws_answer({"statusCode": 0})
        if "JSESSIONID" not in request.cookies:
            response.set_cookie("JSESSIONID", "abc.node1", path="/", httponly=True)
        return response

    async with answering(answer) as (url, requests):
        session = GenesysClient(url, {})
        await session.login()
        await session.snapshot()
    assert [request.cookies.get("JSESSIONID") for request in requests] == [None, "abc.node1"]
    assert [request.path_qs for request in requests] == ["/api/v2/me", "/api/v2/me/calls?fields=*"]


@pytest.mark.parametrize("scheme", ["basic", "bearer", "given"])
async def test_the_login_is_whatever_headers_say(scheme: str) -> None:
    """Basic, bearer and what a gateway wants are headers like any other, on every request."""
    async with gws() as (simulator, account):
        basic = aiohttp.encode_basic_auth(account.login, SECRET)
        headers = {
            "basic": {"Authorization": basic},
            "bearer": {"Authorization": f"Bearer {account.token}"},
            "given": {"Authorization": basic, "X-Gateway": "7"},
        }[scheme]
        session = GenesysClient(simulator.url + "/", headers)
        await session.login()
        assert session.headers() == headers
        assert json.loads((await session.snapshot()).raw)["statusCode"] == 0


async def test_the_csrf_token_is_learnt_and_sent() -> None:
    """Any GET tells the token's header and value; a POST without it would be refused."""
    async with gws(csrf=True) as (simulator, account):
        session = client(simulator, account, start_session=True)
        await session.login()
        token = session.headers()["X-CSRF-TOKEN"]
        assert account.contact_centre_session

        simulator.gws.expire_csrf()
        await session.snapshot()
        assert session.headers()["X-CSRF-TOKEN"] != token
        await session.login()


async def test_the_csrf_header_has_the_name_that_the_server_gives() -> None:
    """The name is the server's too."""

    async def answer(request: web.Request) -> web.Response:
        if request.method == "POST" and request.headers.get("X-Strange") != "t1":
            return gws_answer({"statusCode": 3, "statusMessage": "Missing or invalid Csrf token"}, 403)
        return gws_answer({"statusCode": 0}, headers={"X-CSRF-HEADER": "X-Strange", "X-CSRF-TOKEN": "t1"})

    async with answering(answer) as (url, requests):
        await GenesysClient(url, {}, start_session=True).login()
    assert [request.method for request in requests] == ["GET", "POST"]


async def test_a_login_forgets_the_token_of_the_session_before() -> None:
    """The token lives as long as the HTTP session: an old one must not be sent to a new one."""
    tokens = iter([{"X-CSRF-HEADER": "X-CSRF-TOKEN", "X-CSRF-TOKEN": "old"}, {}])

    async def answer(_: web.Request) -> web.Response:
        return gws_answer({"statusCode": 0}, headers=next(tokens))

    async with answering(answer) as (url, requests):
        session = GenesysClient(url, {})
        await session.login()
        assert session.headers() == {"X-CSRF-TOKEN": "old"}
        await session.login()
        assert session.headers() == {}
    assert "X-CSRF-TOKEN" not in requests[1].headers


async def test_a_wrong_password_is_a_login_refused() -> None:
    """GWS says 403 with statusCode 20: no retry helps, a person must act; the secret is not in the text."""
    async with gws() as (simulator, account):
        with pytest.raises(LoginRefused) as refusal:
            await client(simulator, account, password="wrong horse").login()
    text = str(refusal.value)
    assert simulator.url in text
    assert "HTTP 403" in text
    assert "Access denied" in text
    assert "check the account's login and password" in text
    assert "horse" not in text


@pytest.mark.parametrize("status", [401, 403])
async def test_401_and_403_are_refusals(status: int) -> None:
    """A gateway before GWS may say 401."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status)

    async with answering(answer) as (url, _):
        with pytest.raises(LoginRefused, match=f"HTTP {status}"):
            await GenesysClient(url, {}).login()


# ── The contact-centre session ────────────────────────────────────────────────────────────────────────


async def test_nobody_is_logged_in_unasked() -> None:
    """StartContactCenterSession makes an agent appear to the whole centre: not by default."""
    async with gws() as (simulator, account):
        session = client(simulator, account)
        await session.login()
        await session.snapshot()
        assert not account.contact_centre_session
        await client(simulator, account, start_session=True).login()
        assert account.contact_centre_session


async def test_partial_success_is_success() -> None:
    """With statusCode 7 some channel did not start; listening goes on."""
    async with gws(partial_contact_centre_session=True) as (simulator, account):
        await client(simulator, account, start_session=True).login()
        assert account.contact_centre_session


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, {"statusCode": 2, "statusMessage": "Invalid state"}),
        (200, {}),
        (200, []),
        (500, {"statusCode": 4, "statusMessage": "Device '5001' is not registered."}),
        (403, {"statusCode": 3, "statusMessage": "Missing or invalid Csrf token"}),
    ],
)
async def test_a_session_that_does_not_start_may_start_later(status: int, body: Any) -> None:
    """What GWS says is in the message."""

    async def answer(request: web.Request) -> web.Response:
        return gws_answer(body, status) if request.method == "POST" else gws_answer({"statusCode": 0})

    async with answering(answer) as (url, _):
        with pytest.raises(RemoteUnavailable) as error:
            await GenesysClient(url, {}, start_session=True).login()
    assert "StartContactCenterSession" in str(error.value)
    assert f"HTTP {status}" in str(error.value)
    assert (body.get("statusMessage", "") if isinstance(body, dict) else "") in str(error.value)


async def test_what_is_asked_for_is_voice() -> None:
    """The operation, and the one channel that calls need."""
    said: list[Any] = []

    async def answer(request: web.Request) -> web.Response:
        if request.method == "POST":
            said.append(await request.json())
        return gws_answer({"statusCode": 0})

    async with answering(answer) as (url, _):
        await GenesysClient(url, {}, start_session=True).login()
    assert said == [{"operationName": "StartContactCenterSession", "channels": ["voice"]}]


# ── Snapshot ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_snapshot_is_the_exact_answer_and_its_times() -> None:
    """Bytes are kept as they came; the request and the answer have each their time."""
    text = b' {"statusCode" : 0,\n "calls":[ ],"calls":[{"id":"\\u0041"}] } '

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=text, content_type="application/json")

    clock = times()
    async with answering(answer) as (url, _):
        reply = await GenesysClient(url, {}, wall=lambda: next(clock)).snapshot()
    assert reply.raw == text
    assert (reply.asked_at.second, reply.received_at.second) == (0, 1)


async def test_a_snapshot_lists_the_live_calls() -> None:
    """What is going on at the simulator is in it."""
    async with gws(dial_time_scale=1000) as (simulator, account):
        session = client(simulator, account)
        call = simulator.gws.dial(account.login, "+12025550100")
        async with asyncio.timeout(5):
            while not call.live_resources(0.0):  # noqa: ASYNC110 - the call begins in a task of the simulator
                await asyncio.sleep(0.001)
        listed = json.loads((await session.snapshot()).raw)["calls"]
    assert len(listed) == 1


async def test_an_expired_session_logs_in_again_once() -> None:
    """403 to a snapshot: one login, and the snapshot asked for after it."""
    alive = False

    async def answer(request: web.Request) -> web.Response:
        nonlocal alive
        alive = alive or request.path == "/api/v2/me"
        return gws_answer({"statusCode": 0, "calls": []}) if alive else gws_answer(DENIED, 403)

    clock = times()
    async with answering(answer) as (url, requests):
        reply = await GenesysClient(url, {}, wall=lambda: next(clock)).snapshot()
    assert [request.path for request in requests] == ["/api/v2/me/calls", "/api/v2/me", "/api/v2/me/calls"]
    # What was heard while we logged in is not older than the snapshot.
    assert (reply.asked_at.second, reply.received_at.second) == (1, 2)


async def test_a_snapshot_denied_after_a_login_is_not_asked_for_again() -> None:
    """Permission is missing, not a login: no circle."""

    async def answer(request: web.Request) -> web.Response:
        return gws_answer({"statusCode": 0}) if request.path == "/api/v2/me" else gws_answer(DENIED, 403)

    async with answering(answer) as (url, requests):
        with pytest.raises(RemoteUnavailable, match="HTTP 403"):
            await GenesysClient(url, {}).snapshot()
    assert len(requests) == 3


async def test_a_snapshot_whose_login_is_refused_says_so() -> None:
    """The password was changed while we listened."""
    async with gws() as (simulator, account):
        session = client(simulator, account)
        await session.login()
        account.refused = True
        with pytest.raises(LoginRefused):
            await session.snapshot()


async def test_the_paths_are_configurable() -> None:
    """Another product, another path."""

    async def answer(_: web.Request) -> web.Response:
        return gws_answer({"statusCode": 0})

    async with answering(answer) as (url, requests):
        session = GenesysClient(url, {}, me_path="/workspace/v3/me", snapshot_path="/workspace/v3/calls")
        await session.login()
        await session.snapshot()
    assert [request.path for request in requests] == ["/workspace/v3/me", "/workspace/v3/calls"]


# ── Trouble ───────────────────────────────────────────────────────────────────────────────────────────


async def too_large(request: web.Request) -> web.StreamResponse:
    """More than is read, in pieces, without a length."""
    response = web.StreamResponse()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):  # nobody reads to the end
        for _ in range(REPLY_BYTES_MAX // 2**20 + 1):
            await response.write(b" " * 2**20)
    return response


async def too_late(request: web.Request) -> web.StreamResponse:
    """The headers, and then nothing."""
    response = web.StreamResponse()
    await response.prepare(request)
    await asyncio.Event().wait()
    return response


async def elsewhere(_: web.Request) -> web.StreamResponse:
    """A redirect, as of a gateway that wants a login page shown."""
    return web.Response(status=302, headers={"Location": "https://login.example/form"})


async def cut(request: web.Request) -> web.StreamResponse:
    """Less than was announced."""
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b"{")
    assert request.transport is not None
    request.transport.abort()
    return response


async def broken(_: web.Request) -> web.StreamResponse:
    """Several lines of HTML, as a gateway shows them."""
    return web.Response(status=503, text="<html>\n<b>Service\nunavailable</b>" + "x" * 1_000)


async def nowhere(_: web.Request) -> web.StreamResponse:
    """No such resource."""
    return web.Response(status=404)


TROUBLE: dict[str, tuple[Handler, str, str]] = {
    "too large": (too_large, f"more than {REPLY_BYTES_MAX} bytes", "snapshot_path"),
    "too late": (too_late, "no answer within 0.3 s", "check base_url"),
    "elsewhere": (elsewhere, "HTTP 302 to https://login.example/form", "set base_url"),
    "cut": (cut, "ClientPayloadError", "check base_url"),
    "broken": (broken, "HTTP 503 <html> <b>Service unavailable</b>", "tried again"),
    "nowhere": (nowhere, "HTTP 404", "check base_url and the path"),
}


@pytest.mark.parametrize("trouble", TROUBLE)
@pytest.mark.parametrize("what", ["login", "snapshot"])
async def test_trouble_has_a_cause_and_a_cure(trouble: str, what: str) -> None:
    """Whatever comes instead of an answer, the message names the URL, what happened and what to do."""
    handler, cause, cure = TROUBLE[trouble]
    async with answering(handler) as (url, requests):
        session = GenesysClient(url, {"Authorization": f"Bearer {SECRET}"}, request_s=0.3)
        if trouble == "too large":
            session = GenesysClient(url, {})
        with pytest.raises(RemoteUnavailable) as error:
            await getattr(session, what)()
    text = str(error.value)
    assert text.startswith(url + "/api/v2/me")
    assert cause in text
    assert cure in text
    assert len(text) < 500
    assert "\n" not in text
    assert SECRET not in text
    assert len(requests) == 1


async def test_nobody_there_has_a_cause_and_a_cure() -> None:
    """A server that does not listen, and a name that nobody knows."""
    for url in (f"http://{HOST}:{free_port()}", "http://no-such-host.invalid"):
        with pytest.raises(RemoteUnavailable) as error:
            await GenesysClient(url, {}).login()
        assert str(error.value).startswith(url)
        assert "check base_url" in str(error.value)


async def test_a_caller_that_gives_up_is_obeyed() -> None:
    """A cancelled request is cancelled, not reported as trouble."""
    async with answering(too_late) as (url, requests):
        request = asyncio.get_running_loop().create_task(GenesysClient(url, {}).login())
        async with asyncio.timeout(5):
            while not requests:  # noqa: ASYNC110 - the server tells nobody
                await asyncio.sleep(0.001)
        request.cancel()
        await asyncio.wait({request})
        assert request.cancelled()


# ── Dials ─────────────────────────────────────────────────────────────────────────────────────────────

DIAL = GwsDial(number="+12025550100", device="d-1")
DIAL_PATH = "/api/v2/me/devices/d-1/calls"
CSRF_REFUSED = {"statusCode": 3, "statusMessage": "Missing or invalid Csrf token"}


def devices(*ids: str) -> web.Response:
    """The list of these devices."""
    listed = [{"id": id, "phoneNumber": f"50{id}", "deviceState": "Active"} for id in ids]
    return gws_answer({"statusCode": 0, "devices": listed})


@pytest.mark.parametrize("csrf", [False, True])
async def test_a_dial_makes_a_call(csrf: bool) -> None:
    """By the account's only device, with the token where one is wanted, and with what it was given."""
    async with gws(csrf=csrf, dial_time_scale=1000) as (simulator, account):
        session = client(simulator, account)
        dial = GwsDial(number="+12025550100", user_data={"a": {"b": 1}}, reference="d-7")
        assert await session.dial(dial) == Accepted()
        assert account.dials == 1
        (device,) = await session.devices()
        assert device == Device(account.agent.device_id, account.agent.dn)


@pytest.mark.parametrize("what", ["token", "session"])
async def test_a_dial_that_was_refused_for_its_token_is_sent_again(what: str) -> None:
    """It was not carried out; the new token is fetched by a login, once."""
    async with gws(csrf=True, dial_time_scale=1000) as (simulator, account):
        session = client(simulator, account)
        await session.login()
        if what == "token":
            simulator.gws.expire_csrf()
        else:
            session.jar.clear()
            session.token = {}
        dial = GwsDial(number="+12025550100", device=account.agent.device_id)
        assert await session.dial(dial) == Accepted()
        assert account.dials == 1


async def test_a_dial_is_refused_twice_and_no_more() -> None:
    """A permission is missing, not a login: no circle, and the party's own code."""

    async def answer(request: web.Request) -> web.Response:
        return gws_answer({"statusCode": 0}) if request.method == "GET" else gws_answer(CSRF_REFUSED, 403)

    async with answering(answer) as (url, requests):
        fact = await GenesysClient(url, {}).dial(DIAL)
    assert fact == Refused(Cause(System.GWS, "statusCode", "3", "Missing or invalid Csrf token"))
    assert [request.path for request in requests] == [DIAL_PATH, "/api/v2/me", DIAL_PATH]


@pytest.mark.parametrize("status", [200, 403, 500])
async def test_a_session_that_no_login_mends(status: int) -> None:
    """statusCode 20 after a login that was taken is a refused login all the same."""

    async def answer(request: web.Request) -> web.Response:
        return gws_answer({"statusCode": 0}) if request.method == "GET" else gws_answer(DENIED, status)

    async with answering(answer) as (url, requests):
        fact = await GenesysClient(url, {}).dial(DIAL)
    assert isinstance(fact, Refused)
    assert (fact.cause.field, fact.cause.code) == ("login", "")
    assert "Access denied" in fact.cause.text
    assert len(requests) == 3


async def test_a_dial_that_was_refused_stays_refused_when_no_login_can_be_had() -> None:
    """It was not carried out, and that is what is told; it is not sent again."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=503) if request.method == "GET" else gws_answer(CSRF_REFUSED, 403)

    async with answering(answer) as (url, requests):
        fact = await GenesysClient(url, {}).dial(DIAL)
    assert fact == Refused(Cause(System.GWS, "statusCode", "3", "Missing or invalid Csrf token"))
    assert [request.method for request in requests] == ["POST", "GET"]


@pytest.mark.parametrize("code", [7, 9])
async def test_neither_yes_nor_no(code: int) -> None:
    """Partial success and incomplete processing: it may still be dialled."""

    async def answer(_: web.Request) -> web.Response:
        return gws_answer({"statusCode": code, "statusMessage": "in part"})

    async with answering(answer) as (url, requests):
        fact = await GenesysClient(url, {}).dial(DIAL)
    assert isinstance(fact, NotAnswered)
    assert fact.sent
    assert "in part" in fact.text
    assert len(requests) == 1


@pytest.mark.parametrize("status", [200, 400, 500, 502])
@pytest.mark.parametrize("code", [1, 2, 4, 5, 6, 10, 99])
async def test_gws_own_code_comes_before_the_status(status: int, code: int) -> None:
    """HTTP says less than statusCode does, also where a gateway's status is used."""

    async def answer(_: web.Request) -> web.Response:
        return gws_answer({"statusCode": code, "statusMessage": "So it is"}, status)

    async with answering(answer) as (url, requests):
        fact = await GenesysClient(url, {}).dial(DIAL)
    assert fact == Refused(Cause(System.GWS, "statusCode", str(code), "So it is"))
    assert len(requests) == 1


@pytest.mark.parametrize(
    "request_", [GwsDial(number="1"), GwsPreviewDial(outbound_record={"phoneNumber": "1"})]
)
async def test_the_only_device_dials(request_: GwsDial | GwsPreviewDial) -> None:
    """A request that names none has its device found; the record's request names it in its body too."""
    said: list[Any] = []

    async def answer(request: web.Request) -> web.Response:
        if request.method == "GET":
            return devices("7")
        said.append((request.path, await request.json()))
        return gws_answer({"statusCode": 0})

    async with answering(answer) as (url, requests):
        assert await GenesysClient(url, {}).dial(request_) == Accepted()
    assert requests[0].path_qs == "/api/v2/me/devices?fields=*"
    ((path, body),) = said
    assert path == "/api/v2/me/devices/7/calls"
    assert body.get("devicePath") == ("/devices/7" if isinstance(request_, GwsPreviewDial) else None)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "the account has none; give it one"),
        (["1", "2"], "the account has 2; name one of them: 1 (501), 2 (502)"),
        ([str(number) for number in range(30)], "9 (509), …"),
    ],
)
async def test_which_device_must_be_clear(ids: list[str], words: str) -> None:
    """Of several none is chosen: the refusal names them, and nothing is sent."""

    async def answer(_: web.Request) -> web.Response:
        return devices(*ids)

    async with answering(answer) as (url, requests):
        fact = await GenesysClient(url, {}).dial(GwsDial(number="1"))
    assert isinstance(fact, Refused)
    assert (fact.cause.field, fact.cause.code) == ("validation", "device")
    assert words in fact.cause.text
    assert [request.method for request in requests] == ["GET"]


@pytest.mark.parametrize("id", ["../x", "", "a b"])
async def test_a_device_with_an_id_that_is_none_does_not_dial(id: str) -> None:
    """Whatever is listed, no other path is posted to."""

    async def answer(_: web.Request) -> web.Response:
        return devices(id)

    async with answering(answer) as (url, requests):
        fact = await GenesysClient(url, {}).dial(GwsDial(number="1"))
    assert isinstance(fact, Refused)
    assert (fact.cause.field, fact.cause.code) == ("validation", "device")
    assert [request.method for request in requests] == ["GET"]


@pytest.mark.parametrize("body", ["", "[]", '{"devices": [{}]}', '{"devices": 1}', "<html>"])
async def test_a_list_of_devices_that_is_none(body: str) -> None:
    """Nothing was sent, and the cure is to name the device."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=body)

    async with answering(answer) as (url, requests):
        fact = await GenesysClient(url, {}).dial(GwsDial(number="1"))
    assert isinstance(fact, NotAnswered)
    assert not fact.sent
    assert "name the device" in fact.text
    assert len(requests) == 1


async def test_devices_are_asked_for_with_a_login() -> None:
    """As the snapshot is; a wrong password is a refused login, and nothing is sent."""
    async with gws() as (simulator, account):
        fact = await client(simulator, account, password="wrong horse").dial(GwsDial(number="1"))
        assert account.dials == 0
    assert isinstance(fact, Refused)
    assert (fact.cause.field, fact.cause.code) == ("login", "")
    assert "check the account's login and password" in fact.cause.text
    assert "horse" not in fact.cause.text


async def test_no_list_of_devices_can_be_had() -> None:
    """Nothing was sent."""
    fact = await GenesysClient(f"http://{HOST}:{free_port()}", {}).dial(GwsDial(number="1"))
    assert isinstance(fact, NotAnswered)
    assert not fact.sent


async def test_a_dial_is_not_sent_late() -> None:
    """Finding the device has one bound over all its requests: an agent who waited that long has given up."""

    async def answer(request: web.Request) -> web.Response:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.6)
        listing = len(requests) > 2 and request.path != "/api/v2/me"
        return devices("7") if listing else gws_answer(DENIED, 200 if request.path == "/api/v2/me" else 403)

    async with answering(answer) as (url, requests):
        fact = await GenesysClient(url, {}, request_s=1.0).dial(GwsDial(number="1"))
        assert [request.method for request in requests] == ["GET", "GET"]
    assert fact == NotAnswered(
        sent=False,
        system=System.GWS,
        text=f"{url}: no device found within 1 s; name the one to dial from",
    )


async def test_a_dial_is_not_repeated_late() -> None:
    """A login whose requests together take longer than one may: the dial was refused, and stays so."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == DIAL_PATH:
            return gws_answer(CSRF_REFUSED, 403)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.6)
        return gws_answer({"statusCode": 0})

    async with answering(answer) as (url, requests):
        fact = await GenesysClient(url, {}, request_s=1.0, start_session=True).dial(DIAL)
        assert [request.path for request in requests] == [DIAL_PATH, "/api/v2/me", "/api/v2/me"]
    assert fact == Refused(Cause(System.GWS, "statusCode", "3", "Missing or invalid Csrf token"))


async def test_what_is_listed_fits_everywhere() -> None:
    """Ids come from outside: a NUL or a megabyte must not stand in a cause."""

    async def answer(_: web.Request) -> web.Response:
        return devices("a\0b", "c" * 1_000_000)

    async with answering(answer) as (url, _):
        fact = await GenesysClient(url, {}).dial(GwsDial(number="1"))
    assert isinstance(fact, Refused)
    assert fact.cause.text.isprintable()
    assert len(fact.cause.text) < 800
