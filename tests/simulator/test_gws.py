"""The REST side of the simulated Genesys Web Services, over real sockets."""

import json
from collections.abc import Callable
from typing import Any

import aiohttp

from listener.simulator.centre import Simulator
from tests.simulator.client import BayeuxClient, basic
from tests.simulator.conftest import LOGIN, Start, until

Clients = Callable[..., BayeuxClient]
DENIED = {"statusCode": 20, "statusMessage": "Access denied"}


async def get(client: BayeuxClient, path: str, **options: Any) -> tuple[int, Any, aiohttp.ClientResponse]:
    """GET a path: status, JSON body, response."""
    async with client.http.get(client.url + path, **options) as response:
        return response.status, json.loads(await response.read()), response


async def post(client: BayeuxClient, path: str, body: Any, **options: Any) -> tuple[int, Any]:
    """POST a JSON body: status, JSON body."""
    async with client.http.post(client.url + path, json=body, **options) as response:
        return response.status, json.loads(await response.read())


def calls_path(simulator: Simulator) -> str:
    """Where to dial from the one account's device."""
    return f"/api/v2/me/devices/{simulator.accounts[LOGIN].agent.device_id}/calls"


def dial_body(number: str) -> dict[str, Any]:
    """What Dial is asked with."""
    return {"operationName": "Dial", "destination": {"phoneNumber": number}}


async def test_nobody_is_403_with_status_code_20(start: Start, clients: Clients) -> None:
    """Without a login everything is 403 and statusCode 20, never 401."""
    async with start() as simulator:
        client = clients(simulator, login=None)
        for path in ("/api/v2/me", "/api/v2/me/devices", "/api/v2/me/calls"):
            assert (await get(client, path))[:2] == (403, DENIED)
        assert await post(client, "/api/v2/me", {}) == (403, DENIED)
        assert await post(client, calls_path(simulator), dial_body("15001")) == (403, DENIED)
        status, body = await client.post(client.message("/meta/handshake"))
        assert (status, json.loads(body)) == (403, DENIED)
        async with client.http.get(
            client.url + "/api/v2/notifications", headers={"Upgrade": "websocket"}
        ) as r:
            assert r.status == 403


async def test_a_wrong_password_is_refused(start: Start, clients: Clients) -> None:
    """Basic with a wrong password, an unknown login or nonsense is 403; so is a password that was changed."""
    async with start() as simulator:
        for login, password in ((LOGIN, "wrong"), ("nobody", "simulated")):
            assert (await get(clients(simulator, login, password), "/api/v2/me"))[:2] == (403, DENIED)
        nonsense = {"Authorization": "Basic ?"}
        assert (await get(clients(simulator, None), "/api/v2/me", headers=nonsense))[0] == 403
        client = clients(simulator)
        assert (await get(client, "/api/v2/me"))[0] == 200
        simulator.accounts[LOGIN].refused = True
        assert (await get(client, "/api/v2/me"))[0] == 403
        del client.http.headers["Authorization"]
        assert (await get(client, "/api/v2/me"))[0] == 403
        bearer = {"Authorization": f"Bearer {simulator.accounts[LOGIN].token}"}
        assert (await get(client, "/api/v2/me", headers=bearer))[0] == 403


async def test_basic_or_bearer_gives_a_session(start: Start, clients: Clients) -> None:
    """GET /api/v2/me sets JSESSIONID, which is a login by itself afterwards, also for CometD."""
    async with start() as simulator:
        account = simulator.accounts[LOGIN]
        for authorization in (
            basic(LOGIN)["Authorization"],
            f"Bearer {account.token}",
        ):
            client = clients(simulator, login=None)
            status, body, response = await get(client, "/api/v2/me", headers={"Authorization": authorization})
            assert (status, body["statusCode"], body["user"]["userName"]) == (200, 0, LOGIN)
            assert "JSESSIONID" in response.cookies
            assert "devices" not in body["user"]
            assert (await get(client, "/api/v2/me"))[0] == 200
            assert (await client.open())["successful"]


async def test_subresources_are_given_on_request(start: Start, clients: Clients) -> None:
    """`?subresources=*` adds the devices and the live calls."""
    async with start() as simulator:
        _, body, _ = await get(clients(simulator), "/api/v2/me?subresources=*")
        assert body["user"]["devices"][0]["phoneNumber"] == "5000"
        assert body["user"]["calls"] == []
        _, body, _ = await get(clients(simulator), "/api/v2/me/devices?fields=*")
        assert body["devices"][0]["id"] == simulator.accounts[LOGIN].agent.device_id


async def test_csrf_tokens_are_wanted_when_on(start: Start, clients: Clients) -> None:
    """With CSRF on, any GET gives the token; a POST without it, or with an old one, is refused."""
    async with start(csrf=True) as simulator:
        client = clients(simulator)
        refusal = {"statusCode": 3, "statusMessage": "Missing or invalid Csrf token"}
        assert await post(client, calls_path(simulator), dial_body("5901")) == (403, refusal)
        _, _, response = await get(client, "/api/v2/me/devices")
        headers = {response.headers["X-CSRF-HEADER"]: response.headers["X-CSRF-TOKEN"]}
        assert (await post(client, calls_path(simulator), dial_body("5901"), headers=headers))[0] == 200
        assert (await client.open())["successful"], "CometD wants no token unless told so"
        simulator.gws.expire_csrf()
        assert await post(client, calls_path(simulator), dial_body("5901"), headers=headers) == (403, refusal)
        _, _, response = await get(client, "/api/v2/me")
        headers = {response.headers["X-CSRF-HEADER"]: response.headers["X-CSRF-TOKEN"]}
        assert (await post(client, calls_path(simulator), dial_body("5901"), headers=headers))[0] == 200


async def test_csrf_needs_a_cookie_store(start: Start, clients: Clients) -> None:
    """A client without cookies gets the same 403 as one with a bad token."""
    async with start(csrf=True) as simulator:
        client = clients(simulator)
        _, _, response = await get(client, "/api/v2/me")
        headers = {"X-CSRF-TOKEN": response.headers["X-CSRF-TOKEN"]}
        client.http.cookie_jar.clear()
        assert (await post(client, calls_path(simulator), dial_body("5901"), headers=headers))[0] == 403


async def test_csrf_may_be_wanted_by_cometd_too(start: Start, clients: Clients) -> None:
    """With the switch on, a handshake without the token is refused, with it it is not."""
    async with start(csrf=True, csrf_on_notifications=True) as simulator:
        client = clients(simulator)
        _, _, response = await get(client, "/api/v2/me")
        assert (await client.post(client.message("/meta/handshake")))[0] == 403
        client.http.headers.update({"X-CSRF-TOKEN": response.headers["X-CSRF-TOKEN"]})
        assert (await client.open())["successful"]


async def test_contact_centre_session(start: Start, clients: Clients) -> None:
    """StartContactCenterSession logs in and says so on the devices channel; Dial may depend on it."""
    async with start(contact_centre_session_required=True) as simulator:
        client = clients(simulator)
        await client.open("/v2/me/devices")
        refused = {"statusCode": 4, "statusMessage": "Device '5000' is not registered."}
        assert await post(client, calls_path(simulator), dial_body("5901")) == (500, refused)
        begin = {"operationName": "StartContactCenterSession", "channels": ["voice"]}
        assert await post(client, "/api/v2/me", begin) == (200, {"statusCode": 0})
        assert (await post(client, calls_path(simulator), dial_body("5901")))[0] == 200
        end = {"operationName": "EndContactCenterSession"}
        assert await post(client, "/api/v2/me", end) == (200, {"statusCode": 0})
        assert (await post(client, "/api/v2/me", {"operationName": "Sing"}))[0] == 400
        await client.connect(timeout=0)
        said = [m["data"] for m in client.data]
        assert [m["messageType"] for m in said] == [
            "ErrorMessage",
            "DeviceStateChangeMessage",
            "DeviceStateChangeMessage",
        ]
        assert [m["devices"][0]["userState"]["state"] for m in said[1:]] == ["Ready", "NotReady"]


async def test_a_partial_contact_centre_session(start: Start, clients: Clients) -> None:
    """With the switch on, the answer is statusCode 7 with failed and succeeded channels."""
    async with start(partial_contact_centre_session=True) as simulator:
        begin = {"operationName": "StartContactCenterSession"}
        status, body = await post(clients(simulator), "/api/v2/me", begin)
        assert (status, body["statusCode"]) == (200, 7)
        assert body["failed"][0]["channel"] == "multimedia"
        assert body["succeeded"] == [{"statusCode": 0, "channel": "voice"}]


async def test_dial_is_told_by_cometd(start: Start, clients: Clients) -> None:
    """Dial answers 0 at once; what became of it depends on the number and comes by CometD."""
    async with start(dial_time_scale=0.001) as simulator:
        client = clients(simulator)
        await client.open("/v2/me/*")
        outcomes = {}
        for number in ("15001", "5901", "5902", "5903"):
            client.data.clear()
            status, body = await post(client, calls_path(simulator), dial_body(number))
            assert (status, body) == (200, {"statusCode": 0})
            await until(lambda: not simulator.accounts[LOGIN].playing)
            await client.connect(timeout=0)
            outcomes[number] = [m["data"].get("call", {}).get("state", "Error") for m in client.data]
            truth = simulator.truth().calls[-1]
            assert (truth.number, truth.finished) == (number, True)
        assert outcomes == {
            "15001": ["Dialing", "Established", "Released"],
            "5901": ["Dialing", "Released"],
            "5902": ["Dialing", "Released"],
            "5903": ["Dialing", "Error", "Released"],
        }


async def test_a_dial_attaches_its_data(start: Start, clients: Clients) -> None:
    """userData of a Dial, and otherFields of a preview record, are the call's from its first message on."""
    record = {"recordHandle": 431, "phoneNumber": "15002", "otherFields": {"Segment": "Gold"}}
    preview = {"operationName": "Dial", "devicePath": "/devices/1", "outboundRecord": record}
    async with start(dial_time_scale=0.001) as simulator:
        client = clients(simulator)
        await client.open("/v2/me/*")
        for body, number, data in (
            ({**dial_body("15001"), "userData": {"K": {"nested": 1}}}, "15001", {"K": {"nested": 1}}),
            (preview, "15002", {"Segment": "Gold"}),
        ):
            client.data.clear()
            assert (await post(client, calls_path(simulator), body))[0] == 200
            await until(lambda: not simulator.accounts[LOGIN].playing)
            await client.connect(timeout=0)
            assert [m["data"]["call"]["userData"] for m in client.data][:1] == [data]
            assert simulator.truth().calls[-1].number == number


async def test_bad_dials_are_refused(start: Start, clients: Clients) -> None:
    """Another device is 500 and statusCode 4; a body without number or operation is statusCode 1."""
    async with start() as simulator:
        client = clients(simulator)
        status, body = await post(client, "/api/v2/me/devices/5001/calls", dial_body("15001"))
        assert (status, body) == (500, {"statusCode": 4, "statusMessage": "Device '5001' is not registered."})
        wrongs: list[Any] = [{}, {"operationName": "Dial"}, [], {"operationName": "Dial", "destination": {}}]
        for wrong in wrongs:
            status, body = await post(client, calls_path(simulator), wrong)
            assert (status, body["statusCode"]) == (400, 1)


async def test_the_snapshot_is_the_live_calls(start: Start, clients: Clients) -> None:
    """At any moment GET /api/v2/me/calls lists exactly the calls that were begun and not released."""
    for dialect in ("v2", "v2-strings", "v2-connid", "v3"):
        async with start(rate=2000, dialect=dialect, calls_per_account=3, seed=4) as simulator:
            client = clients(simulator)
            await client.open()
            live: dict[str, str] = {}
            sizes = set()
            for _ in range(40):
                await simulator.play(notifications=3)
                await client.connect(timeout=0)
                for leg in (m["data"]["call"] for m in client.data if "call" in m["data"]):
                    live[leg["id"]] = leg["state"]
                    if "previousConnId" in leg:
                        live.pop(leg["previousConnId"], None)
                live = {i: state for i, state in live.items() if state not in ("Released", "Completed")}
                client.data.clear()
                status, body, _ = await get(client, "/api/v2/me/calls?fields=*")
                assert (status, body["statusCode"]) == (200, 0)
                assert {leg["id"]: leg["state"] for leg in body["calls"]} == live
                sizes.add(len(live))
            assert max(sizes) >= 3


async def test_the_control_api_is_for_loopback_and_says_what_is_wrong(start: Start, clients: Clients) -> None:
    """Unknown faults and accounts are answered 400 with the reason."""
    async with start() as simulator:
        client = clients(simulator, login=None)
        wrongs: list[Any] = [
            {"fault": "no such"},
            {"refuse_login": "nobody", "on": True},
            {"nonsense": 1},
            {},
        ]
        for wrong in wrongs:
            status, body = await post(client, "/simulator/faults", wrong)
            assert status == 400
            assert "error" in body
        assert await post(client, "/simulator/faults", {"clear": True}) == (200, {"ok": True})
