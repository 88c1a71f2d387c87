"""The API and its client: against the daemon as it runs, with all three systems simulated."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession
from msgspec import structs
from pydantic import SecretStr
from yarl import URL

from listener.api import BODY_BYTES_MAX, Client
from listener.errors import (
    InvalidRequest,
    NotKnown,
    RemoteError,
    RemoteUnavailable,
    SettingsError,
    StoreUnavailable,
)
from listener.settings import Api
from tests.support.centres import TOKEN, Centres, centres
from tests.support.running import InProcess, until


@pytest.fixture
async def there(redis_url: str) -> AsyncIterator[Centres]:
    """The three systems."""
    async with centres(redis_url) as made:
        yield made


@pytest.fixture
async def listening(there: Centres, database: str) -> AsyncIterator[InProcess]:
    """A daemon that hears them."""
    async with InProcess(there.settings(database)).running() as daemon:
        yield daemon


@pytest.fixture
async def client(listening: InProcess) -> AsyncIterator[Client]:
    """A client of it."""
    room = listening.daemon._room
    assert room is not None
    async with Client(f"http://127.0.0.1:{room.port}", TOKEN) as made:
        yield made


async def ended(client: Client, id: str) -> dict[str, Any]:
    """A dial when it has its outcome."""
    return [told async for told in client.follow(id, poll_s=0.02)][-1]


@pytest.mark.parametrize(
    ("system", "parameters", "outcome"),
    [
        ("gws", {"account": "agent5000", "number": "5001"}, "answered"),
        ("noojee", {"number": "0383208100", "extenOrUniqueId": "SIP/101"}, "answered"),
        (
            "click2dial",
            {"agent": "2001", "callee": "0820001234", "outbound_id": "27820001234"},
            "answered",
        ),
    ],
)
async def test_a_dial_from_its_request_to_its_outcome(
    client: Client, there: Centres, system: str, parameters: dict[str, Any], outcome: str
) -> None:
    """Each system: asked for, written down, sent, heard, matched and ended; and the list has it."""
    there.noojee.scripts["0383208100"] = "answered"
    there.click2dial.scripts["0820001234"] = "answered"
    placed = await client.dial(system, campaign="spring", **parameters)
    assert (placed["state"], placed["origin"]) == ("requested", "placed")
    told = await ended(client, placed["id"])
    assert told["outcome"] == outcome
    page = await client.dials(system=system, outcome=outcome, campaign="spring")
    assert [each["id"] for each in page["dials"]] == [placed["id"]]
    assert (await client.dials(campaign="autumn"))["dials"] == []
    assert (await client.why(campaign="spring"))["now"]["dials"] == 1


async def _raw(client: Client, method: str, path: str, **options: Any) -> tuple[int, Any]:
    """Status and JSON of a request that the client would not make."""
    headers = {"Authorization": f"Bearer {TOKEN}"} | options.pop("headers", {})
    async with (
        ClientSession() as http,
        http.request(method, client._url + path, headers=headers, **options) as answer,
    ):
        return answer.status, await answer.json()


GWS = {"system": "gws", "account": "agent5000", "number": "5001"}


async def test_each_refusal_has_its_status(client: Client, there: Centres, listening: InProcess) -> None:
    """By who asks, for what, and how: nothing is sent, and the error says what to do."""
    known = {"json": GWS, "headers": {"Idempotency-Key": "once"}}
    assert (await _raw(client, "POST", "/dials", **known))[0] == 202
    assert (await _raw(client, "POST", "/dials", **known))[0] == 200
    room = listening.daemon._room
    assert room is not None
    quiet = structs.replace(room.gws["agent5001"], dials=False)
    room.gws["agent5001"] = quiet
    asked: list[tuple[int, str, str, dict[str, Any]]] = [
        (400, "POST", "/dials", {"json": {**GWS, "number": ""}}),
        (400, "POST", "/dials", {"json": {**GWS, "nonsense": 1}}),
        (400, "POST", "/dials", {"data": b"{"}),
        (400, "POST", "/dials", {"data": b"[]"}),
        (400, "POST", "/dials", {"json": GWS, "headers": {"Idempotency-Key": "x" * 500}}),
        (401, "POST", "/dials", {"json": GWS, "headers": {"Authorization": "Bearer wrong"}}),
        (401, "GET", "/dials", {"headers": {"Authorization": ""}}),
        (401, "GET", "/dials", {"headers": {"Authorization": "Bearer tök"}}),
        (401, "GET", "/dials", {"headers": {"Authorization": TOKEN}}),
        (403, "POST", "/dials", {"json": {**GWS, "account": "agent5001"}}),
        (404, "POST", "/dials", {"json": {**GWS, "account": "nobody"}}),
        (404, "GET", "/dials/d-none", {}),
        (404, "DELETE", "/dials/d-none", {}),
        (404, "GET", "/elsewhere", {}),
        (404, "POST", "/click2dial/elsewhere", {"json": {}}),
        (405, "PUT", "/dials", {"json": GWS}),
        (409, "POST", "/dials", {"json": {**GWS, "number": "5002"}, "headers": {"Idempotency-Key": "once"}}),
        (413, "POST", "/dials", {"data": b"x" * (BODY_BYTES_MAX + 1)}),
        (400, "POST", "/recordings", {"json": {"action": "dance"}}),
        (502, "POST", "/recordings", {"json": {"action": "start", "extenOrUniqueId": "101"}}),
        (400, "GET", "/dials?outcome=lucky", {}),
        (400, "GET", "/dials?since=teatime", {}),
        (400, "GET", "/dials?limit=0", {}),
        (400, "GET", "/dials?colour=red", {}),
        (400, "GET", "/dials/why?outcome=busy", {}),
    ]
    for status, method, path, options in asked:
        given, told = await _raw(client, method, path, **options)
        assert (given, set(told)) == (status, {"error", "cure"}), (method, path, told)
        assert told["error"], told
        assert told["cure"], told
        assert TOKEN not in str(told)
    assert len((await client.dials())["dials"]) == 1


@pytest.mark.parametrize(
    ("authorization", "status", "challenge"),
    [
        (f"bearer  {TOKEN}", 200, None),
        (f"Token {TOKEN}", 401, 'Bearer realm="listener"'),
        ("Bearer wrong", 401, 'Bearer realm="listener", error="invalid_token"'),
    ],
)
async def test_who_may_ask(client: Client, authorization: str, status: int, challenge: str | None) -> None:
    """Whoever shows the token by the scheme Bearer, however that is spelt; others are told what is asked."""
    async with (
        ClientSession(headers={"Authorization": authorization}) as http,
        http.get(client._url + "/dials") as answer,
    ):
        assert (answer.status, answer.headers.get("WWW-Authenticate")) == (status, challenge)


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Authorization: Bearer \xed\xa0\x80", 401),
        (b"Authorization: \xff", 401),
        (b"Idempotency-Key: \xed\xa0\x80", 400),
        (b"Content-Type: application/json; charset=\xed\xa0\x80", 400),
        (b"Expect: \xed\xa0\x80", 417),
        (b"Expect: 100-continue", 400),
    ],
)
async def test_a_header_that_is_no_text_is_the_askers_fault(
    client: Client, header: bytes, status: int
) -> None:
    """Half a surrogate pair, or bytes that are no UTF-8 at all: a status of its own, and no defect."""
    reader, writer = await asyncio.open_connection("127.0.0.1", URL(client._url).port)
    lines = [b"POST /dials HTTP/1.1", b"Host: here", b"Content-Length: 2", b"Connection: close", header]
    if not header.startswith(b"Authorization"):
        lines.append(b"Authorization: Bearer " + TOKEN.encode())
    writer.write(b"\r\n".join(lines) + b"\r\n\r\n{}")
    async with asyncio.timeout(5):
        answer = (await reader.read()).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    writer.close()
    await writer.wait_closed()
    assert answer.split(b" ")[1] == str(status).encode(), answer
    assert set(msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])) == {"error", "cure"}


NO_TEXT = ["%00", "a%00b", "%ED%A0%80x%00"]
FAR = "9" * 5000


NO_QUESTIONS = [
    *[("id", f"/dials/{value}") for value in NO_TEXT],
    *[
        (name, f"/dials?{name}={value}")
        for name in ("number", "number_ends", "cause", "account", "tenant", "campaign", "after")
        for value in NO_TEXT
    ],
    ("after", "/dials?after=zzz"),
    ("after", f"/dials?after={FAR}-d-1"),
    ("limit", f"/dials?limit={FAR}"),
    ("limit", "/dials?limit=%C2%B2"),
    ("since", f"/dials?last={FAR}d"),
    ("until", "/dials?since=2026-01-02&until=2026-01-01"),
    ("tenant", "/dials/why?tenant=%00"),
    ("since", "/dials/why?since=9999-12-31T23:59:59Z"),
    ("since", "/dials/why?since=0001-01-01T00:00:00Z"),
    ("since", "/dials/why?until=2020-01-01"),
    ("until", "/dials/why?since=2026-01-02&until=2026-01-01"),
]


async def test_what_no_question_can_be_is_400(client: Client) -> None:
    """Whoever asks so gets a sentence about it: asking again later would not help, and nothing is broken."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with ClientSession(headers=headers) as http:
        for argument, path in NO_QUESTIONS:
            for method in ("GET", "DELETE") if argument == "id" else ("GET",):
                async with http.request(method, URL(client._url + path, encoded=True)) as answer:
                    told = await answer.json()
                assert answer.status == 400, (method, path[:60], told)
                name, _, rule = told["error"].partition(": ")
                assert (name, bool(rule), bool(told["cure"])) == (argument, True, True), told


async def test_several_systems_are_asked_for(client: Client, there: Centres) -> None:
    """By repeating the filter."""
    there.noojee.scripts["0383208100"] = "answered"
    await client.dial("gws", account="agent5000", number="5001")
    await client.dial("noojee", number="0383208100", extenOrUniqueId="SIP/101")
    for query, systems in (("system=gws&system=noojee", {"gws", "noojee"}), ("system=noojee", {"noojee"})):
        status, told = await _raw(client, "GET", "/dials?" + query)
        assert (status, {each["system"] for each in told["dials"]}) == (200, systems)


async def test_what_the_store_does_not_take_is_503(client: Client, listening: InProcess) -> None:
    """Nothing is sent, and the client says that asking again with the same key is safe."""
    room = listening.daemon._room
    assert room is not None

    async def refuse(*_: Any) -> Any:
        raise StoreUnavailable("PostgreSQL does not answer; try later")

    room.dials.place = refuse  # type: ignore[method-assign,assignment]
    assert (await _raw(client, "POST", "/dials", json=GWS))[0] == 503
    with pytest.raises(StoreUnavailable, match="does not answer"):
        await client.dial("gws", account="agent5000", number="5001")


async def test_the_client_raises_what_was_refused(client: Client) -> None:
    """Each status is the error that it is here."""
    with pytest.raises(InvalidRequest, match="number: is empty; give it a value"):
        await client.dial("gws", account="agent5000", number="")
    with pytest.raises(NotKnown, match="no account 'nobody'"):
        await client.dial("gws", account="nobody", number="5001")
    with pytest.raises(RemoteError, match="No such call"):
        await client.control("start", extenOrUniqueId="101")
    async with Client(client._url, "wrong") as stranger:
        with pytest.raises(SettingsError, match="refuses the token"):
            await stranger.dials()
    async with Client("http://127.0.0.1:9", TOKEN) as nowhere:
        with pytest.raises(RemoteUnavailable, match=r"no listener answers at http://127\.0\.0\.1:9"):
            await nowhere.dials()


async def test_a_dial_is_hung_up_and_a_call_recorded(client: Client, there: Centres) -> None:
    """By Noojee, while the call goes on: by the id of the very call."""
    there.noojee.scripts["0383208101"] = "not_answered"
    there.noojee._time_scale = 0.2
    dial = await client.dial("noojee", number="0383208101", extenOrUniqueId="SIP/101")
    async for told in client.follow(dial["id"], poll_s=0.02):
        if told["call"] is not None:
            break
    await client.control("start", extenOrUniqueId="101", tag="22")
    await client.hang_up(dial["id"])
    told = await ended(client, dial["id"])
    assert (told["outcome"], told["ended_by"]) == ("cancelled", "agent")
    assert [each["kind"] for each in told["facts"]].count("hangup_requested") == 1
    (call,) = there.noojee.calls
    assert there.noojee.recordings == [("start", call.unique_call_id, "22", "")]


async def test_a_call_that_is_hung_up_ends_its_dial_by_us(client: Client, there: Centres) -> None:
    """By POST /calls with the id of the call, whoever dialled: it is cancelled, and by us."""
    there.noojee._time_scale = 0.2
    there.noojee.monitor("102")
    there.noojee.scripts["0383208102"] = "not_answered"
    placed = await client.dial("noojee", number="0383208102", extenOrUniqueId="SIP/101")
    overheard = there.noojee.call("102", "not_answered", "0383208103")

    async def begun() -> bool:
        page = await client.dials(system="noojee")
        return [each["call"] is not None for each in page["dials"]] == [True, True]

    await until(begun)
    for call in there.noojee.calls:
        await client.control("hangup", extenOrUniqueId=call.unique_call_id)
    assert overheard.known == "cancelled"
    for each in (await client.dials(system="noojee"))["dials"]:
        told = await ended(client, each["id"])
        assert (told["outcome"], told["ended_by"]) == ("cancelled", "agent")
    assert placed["id"] in {each["id"] for each in (await client.dials(outcome="cancelled"))["dials"]}


async def test_a_record_by_webhook_ends_a_dial(client: Client, there: Centres) -> None:
    """Posted to /click2dial/NAME with the token of the webhook, in the URL as its PBX was given it."""
    there.click2dial.scripts["0820001234"] = "busy"
    there.click2dial._redis = None
    there.click2dial.webhook = f"{client._url}/click2dial/c2d?token={TOKEN}"
    dial = await client.dial("click2dial", agent="2001", callee="0820001234", outbound_id="27820001234")
    assert (await ended(client, dial["id"]))["outcome"] == "busy"
    status, told = await _raw(client, "GET", "/dials?cause=end_reason+busy+17")
    assert status == 200
    assert [each["id"] for each in told["dials"]] == [dial["id"]]


async def test_pages_go_on_where_they_ended(client: Client) -> None:
    """A list in pages is the whole list, and why is answered of the same dials."""
    ids = [(await client.dial("gws", account="agent5000", number=f"500{each}"))["id"] for each in range(5)]
    found: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = await client.dials(limit="2", origin="placed", **after)
        found += [each["id"] for each in page["dials"]]
        if page["after"] is None:
            break
        after = {"after": page["after"]}
    assert found == ids[::-1]
    for id in ids:
        await ended(client, id)
    why = await client.why(last="1h")
    assert why["now"] == {"dials": 5, "failures": 0}
    assert why["sentence"]


async def test_without_a_token_nobody_may_ask(there: Centres, database: str) -> None:
    """The API is there for webhooks alone."""
    settings = there.settings(database, api=Api(port=0))
    async with InProcess(settings).running() as listening:
        room = listening.daemon._room
        assert room is not None
        async with Client(f"http://127.0.0.1:{room.port}", TOKEN) as client:
            assert (await _raw(client, "GET", "/dials"))[0] == 403


async def test_a_port_that_is_taken_is_said(there: Centres, database: str) -> None:
    """With the setting and the cure, and the daemon does not start."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        settings = there.settings(database, api=Api(port=port, token=SecretStr(TOKEN)))
        with pytest.raises(ExceptionGroup) as refused:
            async with InProcess(settings).running():
                pass
        assert refused.group_contains(SettingsError, match=f"api.port {port}: cannot listen there")
