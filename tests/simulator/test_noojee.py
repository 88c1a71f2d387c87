"""The simulated Noojee, as a plain client meets it: its six operations, its events and their traps."""

import asyncio
from contextlib import suppress
from typing import Any

import aiohttp
import pytest

from listener.errors import SettingsError
from listener.simulator.noojee import API, MIX, REFUSED, SCRIPTS, NoojeeServer
from tests.simulator.conftest import until

KEY = "simulated-key"
NUMBER = "0383200417"
FAST = 0.001


async def ask(server: NoojeeServer, operation: str, **query: Any) -> Any:
    """One operation, as it is answered."""
    query.setdefault("apiKey", KEY)
    async with (
        aiohttp.ClientSession() as http,
        http.post(server.url + API + operation, params={k: str(v) for k, v in query.items()}) as response,
    ):
        assert response.status == 200
        return await response.json()


async def dial(server: NoojeeServer, number: str = NUMBER, **query: Any) -> Any:
    """A dial from SIP/204 that is monitored."""
    return await ask(
        server, "dial", **({"number": number, "extenOrUniqueId": "SIP/204", "monitored": "yes"} | query)
    )


async def told(server: NoojeeServer, exten: str = "204", after: int = 0, timeout_s: float = 0) -> Any:
    """One subscribe."""
    return await ask(server, "subscribe", exten=exten, lastSequenceNumber=after, timeOut=timeout_s)


def statuses(reply: Any, extension: str = "204") -> list[str]:
    """The statuses of an extension in a reply."""
    return [each["CallData"]["status"] for each in reply["Data"].get(extension, [])]


async def test_a_dial_is_queued_and_then_heard() -> None:
    """The answer is that of the vendor's page; its SessionID is in no event; nothing is a click to dial."""
    async with NoojeeServer(scripts={NUMBER: "transferred"}, time_scale=FAST) as server:
        assert await dial(server, record="true", tag="t-1", callerId="0399") == {
            "SessionID": 1,
            "Message": "Originate successfully queued",
            "Code": 0,
        }
        await server.idle()
        reply = await told(server, after=0, timeout_s=5)
        assert statuses(reply) == ["Dialing Out", "Connected", "Unlinked", "Connected", "Hungup"]
        assert (reply["seq"], reply["Code"]) == (5, 0)
        first = reply["Data"]["204"][0]
        assert (first["CallData"]["inbound"], first["CallData"]["isClickToDialCall"]) == (False, False)
        assert first["CallData"]["outboundDestination"] == NUMBER
        assert not {"SessionID", "seq"} & {*first, *first["CallData"]}
        (call,) = server.calls
        assert (call.known, call.statuses, call.record, call.tag) == (
            "answered",
            statuses(reply),
            True,
            "t-1",
        )
        assert call.arguments["callerId"] == "0399"
        assert KEY not in str(server.truth())


@pytest.mark.parametrize("script", sorted(SCRIPTS))
async def test_every_script_is_told_as_it_is_written(script: str) -> None:
    """What was said is the script's, in order, and its truth is kept."""
    async with NoojeeServer(
        scripts={NUMBER: script}, time_scale=FAST, monitored=frozenset({"204"})
    ) as server:
        if SCRIPTS[script].inbound:
            server.call("204", script)
        else:
            await dial(server)
        await server.idle()
        written = [status.removeprefix("inbound:") for _, status in SCRIPTS[script].acts if status]
        assert statuses(await told(server, after=0, timeout_s=0.05)) in (written, written[-1:])
        assert server.calls[0].statuses == written
        assert server.calls[0].known == SCRIPTS[script].known


async def test_only_monitored_extensions_are_heard() -> None:
    """And the technology is no part of an extension."""
    async with NoojeeServer(mix={"answered": 1}, time_scale=FAST) as server:
        await dial(server, monitored="no")
        await server.idle()
        assert (await told(server, timeout_s=0.05))["Data"] == {}
        assert server.calls[0].known == "unknown"
        await dial(server)
        await server.idle()
        assert (await told(server, exten="SIP/204", timeout_s=0.05))["Data"] == {}
        assert statuses(await told(server, exten="205,204", timeout_s=0.05))[-1] == "Hungup"


@pytest.mark.parametrize(
    ("operation", "query"),
    [
        ("dial", {"apiKey": "another"}),
        ("dial", {"number": ""}),
        ("dial", {"extenOrUniqueId": "204"}),
        ("dial", {"number": "0400"}),
        ("subscribe", {"Exten": "204", "lastSequenceNumber": 0}),
        ("hangup", {"extenOrUniqueId": "999"}),
        ("answer", {"uniqueId": "1.1", "exten": "SIP/204"}),
        ("start", {"extenOrUniqueId": "999"}),
    ],
)
async def test_errors_are_a_negative_code(operation: str, query: dict[str, Any]) -> None:
    """Wrong key, a lacking argument, an extension without technology, a name in the wrong case, no call."""
    async with NoojeeServer(scripts={"0400": REFUSED}) as server:
        given = {"number": NUMBER, "extenOrUniqueId": "SIP/204"} if operation == "dial" else {}
        assert (await ask(server, operation, **(given | query)))["Code"] == -1
        assert not [call for call in server.calls if call.script != REFUSED]


@pytest.mark.parametrize(("fault", "known"), [("cut_before", "unknown"), ("cut_after", "failed")])
async def test_a_refusal_that_nobody_hears_is_not_known(fault: str, known: str) -> None:
    """It has no events: its answer is all that says so, and without that nothing proves a failure."""
    async with NoojeeServer(scripts={NUMBER: REFUSED}) as server:
        server.faults.arm(fault, on="dial")
        with suppress(aiohttp.ClientError):
            await dial(server)
        (call,) = server.calls
        assert (call.happened, call.known) == ("failed", known)


async def test_only_post_is_accepted() -> None:
    """As the page says, whatever the vendor's client does."""
    async with (
        NoojeeServer() as server,
        aiohttp.ClientSession() as http,
        http.get(server.url + API + "start", params={"apiKey": KEY}) as response,
    ):
        assert response.status == 405


async def test_a_poll_waits_and_brings_several_events() -> None:
    """It is held until something happens, gathers a little, and is empty at its time-out."""
    async with NoojeeServer(monitored=frozenset({"204", "205"})) as server:
        empty = await told(server, timeout_s=0.05)
        assert empty == {"Data": {}, "seq": 0, "Code": 0}
        async with asyncio.TaskGroup() as tasks:
            poll = tasks.create_task(told(server, exten="204,205", timeout_s=10))
            await until(lambda: server.polls == 1)
            server.call("204", "inbound_busy")
            server.call("205", "inbound_busy")
        reply = poll.result()
        assert (statuses(reply, "204"), statuses(reply, "205"), reply["seq"]) == (["Busy"], ["Busy"], 2)
        assert statuses(await told(server, after=1, exten="204,205", timeout_s=0.05), "205") == ["Busy"]


async def test_number_0_tells_what_is_live() -> None:
    """At once, each call as it is; calls that are over are not."""
    scripts = {"01": "not_answered", "02": "callee_busy"}
    async with NoojeeServer(scripts=scripts, time_scale=0.02) as server:
        await dial(server, "02")
        await server.idle()
        await dial(server, "01")
        await until(lambda: server.seq == 3)
        reply = await told(server)
        assert [each["CallData"]["outboundDestination"] for each in reply["Data"]["204"]] == ["01"]
        assert (statuses(reply), reply["seq"]) == (["Dialing Out"], 3)


async def test_a_restarted_pbx_counts_from_0() -> None:
    """Its calls and events are gone, and who asks with an old number waits."""
    async with NoojeeServer(scripts={NUMBER: "answered"}, time_scale=FAST) as server:
        await dial(server)
        await server.idle()
        await server.restart()
        assert await told(server, after=3, timeout_s=0.05) == {"Data": {}, "seq": 0, "Code": 0}
        await dial(server)
        await server.idle()
        assert (await told(server, after=3, timeout_s=0.05))["Data"] == {}
        assert (await told(server, after=1, timeout_s=0.05))["seq"] == 3


async def test_hang_up_and_recording() -> None:
    """By unique id or extension; a call that was hung up before it was connected was cancelled."""
    async with NoojeeServer(scripts={NUMBER: "not_answered"}, time_scale=0.1) as server:
        await dial(server)
        await until(lambda: server.seq == 1)
        call = server.calls[0]
        assert (await ask(server, "start", extenOrUniqueId="204", tag="t", agentLoginName="fred"))[
            "Code"
        ] == 0
        assert (await ask(server, "stop", extenOrUniqueId=call.unique_call_id))["Code"] == 0
        assert [each[0] for each in server.recordings] == ["start", "stop"]
        assert server.recordings[0][1:] == (call.unique_call_id, "t", "fred")
        hungup = await ask(server, "hangup", extenOrUniqueId=call.unique_call_id)
        assert hungup == {"Message": "Channel Hungup", "Code": 0}
        await server.idle()
        assert (call.known, call.statuses) == ("cancelled", ["Dialing Out", "Hungup"])


async def test_answer() -> None:
    """A call that rings is answered."""
    async with NoojeeServer(monitored=frozenset({"204"}), time_scale=0.1) as server:
        call = server.call("204", "inbound_answered")
        await until(lambda: call.status == "Ringing")
        answered = await ask(
            server, "answer", uniqueId=call.unique_call_id, exten="SIP/204", answerString="a"
        )
        assert (answered["Code"], call.status) == (0, "Connected")


async def test_the_same_seed_ends_dials_alike() -> None:
    """And in the proportions of the mix all endings come."""
    drawn = []
    for _ in range(2):
        async with NoojeeServer(time_scale=0, seed=7) as server:
            for number in range(200):
                await dial(server, f"04{number:08}")
            await server.idle()
            drawn.append([call.script for call in server.calls])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) >= len(MIX) - 2


def test_a_script_that_there_is_not() -> None:
    """Is named, with those that there are."""
    with pytest.raises(SettingsError, match=r"no such Noojee script 'x'.*answered"):
        NoojeeServer(scripts={"1": "x"})
