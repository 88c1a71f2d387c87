"""Noojee's events: each is heard once whatever becomes of the replies, and no silence goes unsaid."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any
from urllib.parse import quote, quote_plus

import aiohttp
import asyncpg
import pytest
from aiohttp import web

from listener.adapters import noojee
from listener.adapters.noojee import (
    EVENTS_MAX,
    REPLIES_UNREADABLE_MAX,
    RETRY_S_MAX,
    NoojeeEvents,
    NoojeeHeard,
    NoojeePlace,
)
from listener.core.calls import GAP_CAUSES, Notification
from listener.core.decode import decode
from listener.core.dialling import Accepted, Elapsed, System, advance, match, placed
from listener.core.pbx import noojee_fact, noojee_sighting
from listener.pipeline import Pipeline
from listener.simulator.noojee import API, SCRIPTS, NoojeeServer
from listener.store.journal import Journal
from tests.simulator.conftest import until
from tests.test_pipeline import Counts, running

KEY = "simulated-key"
NUMBER = "0383200417"
FAST = 0.002
BRIEF_S = 0.02
"""Between two attempts of the tests."""


class Ears:
    """Takes what is heard, stores it at once unless told otherwise, and remembers everything."""

    def __init__(self) -> None:
        self.events: list[NoojeeHeard] = []
        self.kept: list[NoojeePlace] = []
        self.said: list[tuple[str, str]] = []
        self.until: list[datetime] = []
        self.waiting: list[Callable[[], None]] = []
        self.storing = True

    async def hear(self, events: Sequence[NoojeeHeard], committed: Callable[[], None]) -> None:
        """Events of one extension."""
        assert len({event.extension for event in events}) == 1
        self.events += events
        if self.storing:
            committed()
        else:
            self.waiting.append(committed)

    def keep(self, place: NoojeePlace) -> None:
        """A place to go on from."""
        self.kept.append(place)

    def covered(self, cause: str, detail: str, at: datetime) -> None:
        """Heard, or not."""
        assert at.tzinfo is not None
        assert cause == "" or cause in GAP_CAUSES
        assert KEY not in detail
        self.said.append((cause, detail))

    def answered(self, until: datetime) -> None:
        """Everything until then was handed on."""
        self.until.append(until)

    @property
    def causes(self) -> list[str]:
        """What was said of coverage, in order."""
        return [cause for cause, _ in self.said]

    def statuses(self, extension: str = "204") -> list[str]:
        """What happened at an extension, each place once."""
        found: dict[tuple[str, int], NoojeeHeard] = {}
        for each in self.events:
            known = found.setdefault((each.stream, each.position), each)
            assert known.raw == each.raw, "two events at one place"
        return [
            each.event.status
            for each in found.values()
            if each.event is not None and each.extension == extension
        ]


def events_of(server_url: str, ears: Any, **settings: Any) -> NoojeeEvents:
    """What is tried, impatient."""
    return NoojeeEvents(
        "pbx1", server_url, settings.pop("key", KEY), ears, **({"retry_s": BRIEF_S} | settings)
    )


@asynccontextmanager
async def hearing(events: NoojeeEvents, *extensions: str) -> AsyncIterator[NoojeeEvents]:
    """It hears these extensions during the block."""
    for extension in extensions:
        events.watch(extension)
    async with asyncio.TaskGroup() as tasks:
        work = tasks.create_task(events.run())
        try:
            yield events
        finally:
            work.cancel()


async def dial(server: NoojeeServer, extension: str = "204", number: str = NUMBER) -> None:
    """A monitored dial, made by a plain client."""
    query = {"number": number, "extenOrUniqueId": f"SIP/{extension}", "monitored": "yes", "apiKey": KEY}
    async with (
        aiohttp.ClientSession() as http,
        http.post(server.url + API + "dial", params=query) as response,
    ):
        assert (await response.json())["Code"] == 0


# ── Against the simulated Noojee ──────────────────────────────────────────────────────────────────────


async def test_what_happens_at_an_extension_is_heard() -> None:
    """In order, with its exact bytes, and decoded as the call table takes it."""
    ears = Ears()
    async with NoojeeServer(scripts={NUMBER: "transferred"}, time_scale=FAST) as server:
        async with hearing(events_of(server.url, ears), "204"):
            await until(lambda: ears.causes == [""])
            await dial(server)
            await until(lambda: len(ears.events) == 5)
        assert ears.statuses() == server.calls[0].statuses
        first = ears.events[0]
        assert json.loads(first.raw)["CallData"]["uniqueCallId"] == server.calls[0].unique_call_id
        assert first.event is not None
        assert (first.event.outbound_destination, first.event.inbound) == (NUMBER, False)
        decoded = decode(first.raw, first.channel)
        assert isinstance(decoded, Notification)
        assert (decoded.state, decoded.phone_number) == ("Dialing", "204")
        assert first.heard(7).account == 7
        assert ears.kept[-1].seq == server.seq == 5


async def test_every_status_is_handed_on() -> None:
    """Also those that nobody knows."""
    ears = Ears()
    async with (
        NoojeeServer(scripts={NUMBER: "strange"}, time_scale=FAST) as server,
        hearing(events_of(server.url, ears), "204"),
    ):
        await until(lambda: ears.causes == [""])
        await dial(server)
        await until(lambda: len(ears.events) == 4)
    assert ears.statuses()[1] == "Whispering"


async def test_quiet_polls_are_no_trouble() -> None:
    """A poll that finds nothing ends by itself at the server, before we lose patience."""
    ears = Ears()
    async with (
        NoojeeServer(monitored=frozenset({"204"})) as server,
        hearing(events_of(server.url, ears, poll_s=0.15), "204"),
    ):
        await until(lambda: server.exchanges["subscribe"] >= 4)
        assert ears.causes == [""]
        server.call("204", "inbound_busy")
        await until(lambda: ears.statuses() == ["Busy"])


async def test_a_quiet_poll_says_that_nothing_happened_until_its_end() -> None:
    """One that waited as long as it may at the server; one that brings events, as short as it may be, tells
    only that what happened before it was asked is in it."""
    ears, poll_s = Ears(), 0.2
    asked: list[datetime] = []

    def wall() -> datetime:
        asked.append(datetime.now(UTC))  # noqa: TID251 - this is a clock
        return asked[-1]

    async with (
        NoojeeServer(monitored=frozenset({"204"})) as server,
        hearing(events_of(server.url, ears, poll_s=poll_s, wall=wall), "204"),
    ):
        await until(lambda: len(ears.until) == 3)
        first, *quiet = ears.until
        assert first in asked, "what is live now is told at once"
        assert {each - timedelta(seconds=poll_s) for each in quiet} <= set(asked)
        assert ears.until[-1] <= wall()
        told = len(ears.until)
        server.call("204", "inbound_busy")
        await until(lambda: ears.statuses() == ["Busy"])
        (event,) = ears.events
        await until(lambda: any(each in asked and each < event.received_at for each in ears.until[told:]))
        assert ears.until == sorted(ears.until)


async def test_a_new_extension_joins_a_poll_that_waits() -> None:
    """At once, although nothing happens for the others; and it is left out when nobody watches it."""
    ears = Ears()
    async with (
        NoojeeServer(scripts={NUMBER: "callee_busy"}, time_scale=FAST) as server,
        hearing(events_of(server.url, ears), "204") as events,
    ):
        await until(lambda: server.polls == 1)
        events.watch("205")
        events.watch("205")
        await dial(server, "205")
        await until(lambda: ears.statuses("205") == ["Dialing Out", "Hungup"])
        events.unwatch("205")
        await dial(server, "205")
        await until(lambda: len(ears.statuses("205")) == 4)
        events.unwatch("205")
        await dial(server, "205")
        await dial(server, "204")
        await until(lambda: ears.statuses("204") == ["Dialing Out", "Hungup"])
        assert len(ears.statuses("205")) <= 6
        assert ears.causes == [""]


async def test_nobody_to_watch_asks_nothing() -> None:
    """And the first one to be watched is asked for at once."""
    ears = Ears()
    async with NoojeeServer() as server, hearing(events_of(server.url, ears)) as events:
        for _ in range(20):
            await asyncio.sleep(0)
        assert server.exchanges["subscribe"] == 0
        events.watch("204")
        await until(lambda: ears.causes == [""])


async def test_joining_all_the_time_starves_nobody() -> None:
    """Polls are given up for new extensions, and events arrive all the same."""
    ears = Ears()
    async with (
        NoojeeServer(mix={"callee_busy": 1}, time_scale=FAST) as server,
        hearing(events_of(server.url, ears), "204") as events,
    ):
        await until(lambda: server.polls == 1)
        async with asyncio.TaskGroup() as tasks:

            async def joining() -> None:
                number = 1000
                while number < 2000:
                    await asyncio.sleep(0.005)
                    events.watch(str(number))
                    number += 1

            work = tasks.create_task(joining())
            await dial(server)
            await until(lambda: len(ears.statuses()) == 2, timeout_s=3.0)
            assert not work.done()
            work.cancel()


async def test_nothing_is_lost_with_a_reply() -> None:
    """Replies are cut, delayed, refused and nonsense at random: every event is heard, at its own place."""
    ears = Ears()
    rng = Random(5)
    extensions = [str(200 + number) for number in range(6)]
    names = ("unheard", "cut_before", "cut_during", "cut_after", "nonsense", "status", "redirect", "refuse")
    mix = {"answered": 2, "not_answered": 1, "transferred": 1, "strange": 1, "agent_not_answering": 1}
    async with NoojeeServer(time_scale=FAST, seed=5, mix=mix) as server:
        rates = {"slow": 0.04} | dict.fromkeys(names, 0.07)
        async with hearing(events_of(server.url, ears), *extensions):
            # While nothing ever happened the number is 0, which asks for what is live and not for all.
            await until(lambda: "" in ears.causes)
            await dial(server, extensions[0])
            await until(lambda: bool(ears.kept))
            server.faults.at_random(rates, on="subscribe")
            number = 0
            while sum(server.faults.struck.values()) <= 12:
                number += 1
                extension = rng.choice(extensions)
                if number % 5:
                    await dial(server, extension, f"03{number:08}")
                else:
                    server.monitor(extension)
                    server.call(extension, rng.choice(["inbound_answered", "inbound_missed", "answered"]))
            await server.idle()
            server.faults.clear()
            wanted = {
                each: [status for call in server.calls if call.extension == each for status in call.statuses]
                for each in extensions
            }
            await until(lambda: all(len(ears.statuses(each)) >= len(wanted[each]) for each in extensions))
    for each in extensions:
        assert sorted(ears.statuses(each)) == sorted(wanted[each])
    assert {"disconnected", "login refused", "malformed"} & set(ears.causes)
    assert ears.causes[-1] == ""


async def test_a_crash_before_it_is_stored() -> None:
    """The place of what was not stored is not kept: the next run hears the same at the same places."""
    ears, after = Ears(), Ears()
    scripts = {NUMBER: "callee_busy", "02": "not_answered"}
    async with NoojeeServer(scripts=scripts, time_scale=FAST) as server:
        async with hearing(events_of(server.url, ears), "204"):
            await until(lambda: ears.causes == [""])
            await dial(server)
            await until(lambda: len(ears.kept) > 0 and ears.kept[-1].seq == 2)
            ears.storing = False
            await dial(server, number="02")
            await until(lambda: len(ears.statuses()) == 4)
        assert ears.kept[-1].seq == 2
        async with hearing(events_of(server.url, after, place=ears.kept[-1]), "204"):
            await until(lambda: len(after.events) == 2)
        assert after.statuses() == ["Dialing Out", "Hungup"]
        assert {(each.stream, each.position, each.raw) for each in after.events} == {
            (each.stream, each.position, each.raw) for each in ears.events[2:]
        }
        assert after.kept[-1].seq == 4


async def test_places_are_kept_in_order() -> None:
    """What is stored out of turn waits for what came before it."""
    ears = Ears()
    ears.storing = False
    async with (
        NoojeeServer(monitored=frozenset({"204", "205"})) as server,
        hearing(events_of(server.url, ears), "204", "205"),
    ):
        await until(lambda: server.polls == 1)
        server.call("204", "inbound_busy")
        await until(lambda: len(ears.waiting) == 1)
        server.call("205", "inbound_busy")
        await until(lambda: len(ears.waiting) == 2)
        ears.waiting[1]()
        assert ears.kept == []
        ears.waiting[0]()
        assert [place.seq for place in ears.kept] == [2]


async def test_a_pbx_that_was_restarted() -> None:
    """It counts from the beginning again: that is a gap, and what happens then is heard."""
    ears = Ears()
    async with (
        NoojeeServer(scripts={NUMBER: "callee_busy"}, time_scale=FAST) as server,
        hearing(events_of(server.url, ears, poll_s=0.2), "204"),
    ):
        await until(lambda: ears.causes == [""])
        await dial(server)
        await until(lambda: len(ears.events) == 2)
        await server.restart()
        await until(lambda: ears.causes == ["", "session lost", ""])
        assert "0 after 2" in ears.said[1][1]
        await dial(server)
        await until(lambda: len(ears.statuses()) == 4)
        assert len({each.stream for each in ears.events}) == 2


async def test_a_call_that_is_live_at_the_start() -> None:
    """It is told as it is, and each start is another answer."""
    heard = []
    async with NoojeeServer(monitored=frozenset({"204"})) as server:
        server.call("204", "inbound_answered")
        await until(lambda: server.seq == 1)
        for ears in (Ears(), Ears()):
            async with hearing(events_of(server.url, ears), "204"):
                await until(lambda events=ears.events: len(events) == 1)  # type: ignore[misc]
            assert ears.statuses() == ["Ringing"]
            heard += ears.events
    assert heard[0].stream != heard[1].stream


async def test_what_is_live_is_a_new_answer_each_time() -> None:
    """Also for a run that goes on where nothing had happened yet: an old place must not hide what is new."""
    heard = []
    for ears in (Ears(), Ears()):
        server = Scripted(said(5, "Ringing"))
        async with (
            server.serving(),
            hearing(
                events_of(server.url, ears, place=NoojeePlace("0b7e6c1e-6d0f-4a53-9d0e-3c1f6b1f5a11", 0)),
                "204",
            ),
        ):
            await until(lambda events=ears.events: len(events) == 1)  # type: ignore[misc]
        heard += ears.events
    assert heard[0].stream != heard[1].stream


async def test_replies_that_are_cut_cost_no_place() -> None:
    """However many: the same is asked again, and the place stays what it was."""
    ears = Ears()
    async with (
        NoojeeServer(monitored=frozenset({"204"})) as server,
        hearing(events_of(server.url, ears, poll_s=0.2), "204") as events,
    ):
        await until(lambda: server.polls == 1)
        server.call("204", "inbound_busy")
        await until(lambda: events.place.seq == 1)
        generation = events.place.generation
        server.faults.arm("cut_during", on="subscribe", times=5)
        await until(lambda: server.faults.struck["cut_during"] == 5)
        server.call("204", "inbound_busy")
        await until(lambda: len(ears.statuses()) == 2)
        assert events.place == NoojeePlace(generation, 2)
    assert ears.causes == ["", "disconnected", ""]


async def test_a_wrong_key_is_said() -> None:
    """And never the key, nor a URL with it."""
    ears = Ears()
    secret = "fa11e9-secret-key"
    async with (
        NoojeeServer() as server,
        hearing(events_of(server.url, ears, key=secret), "204"),
    ):
        await until(lambda: ears.causes == ["login refused"])
    assert "apiKey" in ears.said[0][1]
    assert secret not in ears.said[0][1]


async def test_a_server_that_is_away_is_asked_ever_more_seldom() -> None:
    """The pauses double up to their bound, and half of each is chance."""
    ears = Ears()
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0)

    events = NoojeeEvents("pbx1", "http://127.0.0.1:9", KEY, ears, pause=pause, jitter=lambda: 0.5)
    async with hearing(events, "204"):
        await until(lambda: len(pauses) >= 9)
    assert pauses[:3] == [0.375, 0.75, 1.5]
    assert max(pauses) == RETRY_S_MAX * 0.75
    assert ears.causes == ["disconnected"]


# ── Against a server that says what it is told ────────────────────────────────────────────────────────


class Scripted:
    """Answers each subscribe with the next of these bodies, and remembers what was asked; then it waits."""

    def __init__(self, *bodies: Any) -> None:
        self.bodies = [body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies]
        self.asked: list[dict[str, str]] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        """The next one."""
        self.asked.append(dict(request.query))
        if not self.bodies:
            await asyncio.Event().wait()
        return web.Response(body=self.bodies.pop(0))

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Scripted"]:
        """Listens during the block."""
        app = web.Application()
        app.router.add_post(API + "subscribe", self.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.05, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield self
        finally:
            await runner.cleanup()


def said(seq: int, *statuses: str, extension: str = "204") -> dict[str, Any]:
    """A reply."""
    data = {"uniqueCallId": "1772438400.31", "status": ""}
    events = [{"CallData": data | {"status": status}, "CallID": 1, "Code": 0} for status in statuses]
    return {"Data": {extension: events} if events else {}, "seq": seq, "Code": 0}


async def all_asked(ears: Ears, *bodies: Any) -> Scripted:
    """Hears these replies, and what it asked for, until it asks for one more."""
    async with Scripted(*bodies).serving() as server, hearing(events_of(server.url, ears), "204", "205"):
        await until(lambda: len(server.asked) == len(bodies) + 1)
    return server


async def test_what_is_asked() -> None:
    """A comma list without technology, at once while we know nothing, and then as long as a poll lasts."""
    server = await all_asked(Ears(), said(0), said(3, "Ringing"))
    assert [each["exten"] for each in server.asked] == ["204,205"] * 3
    assert [each["lastSequenceNumber"] for each in server.asked] == ["0", "0", "3"]
    assert [each["timeOut"] for each in server.asked] == ["0", "25", "25"]
    assert {each["apiKey"] for each in server.asked} == {KEY}


async def test_extensions_are_handed_on_beside_each_other() -> None:
    """Each of them waits for the store; one after the other, a hundred of them would wait a hundred times."""
    reached = asyncio.Barrier(2)

    class Waiting(Ears):
        """Takes nothing of one extension before the other is there."""

        async def hear(self, events: Sequence[NoojeeHeard], committed: Callable[[], None]) -> None:
            """Events of one extension."""
            await reached.wait()
            await super().hear(events, committed)

    ears = Waiting()
    event = b'[{"CallData":{"uniqueCallId":"1.1","status":"Ringing"},"CallID":1}]'
    raw = b'{"Data":{"204":' + event + b',"205":' + event + b'},"seq":2,"Code":0}'
    await all_asked(ears, raw)
    assert sorted(each.extension for each in ears.events) == ["204", "205"]
    assert ears.kept[-1].seq == 2


async def test_an_event_that_makes_no_sense_is_handed_on() -> None:
    """With its exact bytes, in its place, and the others with it."""
    ears = Ears()
    odd = [b'{"CallData":  null}', b"7", b'{"CallData":{"uniqueCallId":"1.1","status":"\xff"},"CallID":1}']
    raw = b'{"Data":{"204":[' + b",".join(odd) + b']},"seq":9,"Code":0}'
    await all_asked(ears, raw)
    assert [each.raw for each in ears.events] == odd
    assert [each.position % EVENTS_MAX for each in ears.events] == [1, 2, 3]
    assert [each.event is None for each in ears.events] == [True, True, False]
    assert ears.kept[-1].seq == 9


async def test_a_reply_that_never_makes_sense_is_kept_raw() -> None:
    """It is asked for again; after the third time its place is given up, which is a gap."""
    ears = Ears()
    broken = b'{"Data":{"204":{}},"seq":'
    server = await all_asked(ears, said(5, "Ringing"), broken, broken, broken, said(7, "Connected"))
    assert [each["lastSequenceNumber"] for each in server.asked] == ["0", "5", "5", "5", "0", "7"]
    assert [each.raw for each in ears.events if not each.extension] == [broken]
    assert ears.statuses() == ["Ringing", "Connected"]
    assert ears.causes == ["", "malformed", ""]


async def test_what_is_kept_raw_holds_no_key() -> None:
    """A page that quotes the URL is kept byte for byte, but for the key: the journal is for ever."""
    ears = Ears()
    key = "s3cret/key+4711"
    page = b"<html>\xff you asked for /subscribe?timeOut=0&apiKey=%s </html>"
    quoted = [page % said.encode() for said in (key, quote(key, safe=""), quote_plus(key))]
    async with (
        Scripted(*[each for each in quoted for _ in range(REPLIES_UNREADABLE_MAX)]).serving() as server,
        hearing(events_of(server.url, ears, key=key), "204"),
    ):
        await until(lambda: len(ears.events) == len(quoted))
    assert [each.raw for each in ears.events] == [page % b"***"] * len(quoted)


async def test_one_reply_that_makes_no_sense_costs_nothing() -> None:
    """The next one does."""
    ears = Ears()
    server = await all_asked(ears, said(5, "Ringing"), b"<html>", said(7, "Connected"))
    assert [each["lastSequenceNumber"] for each in server.asked] == ["0", "5", "5", "7"]
    assert ears.statuses() == ["Ringing", "Connected"]


async def test_a_reply_without_a_number() -> None:
    """It names no place, so it is none."""
    ears = Ears()
    await all_asked(ears, {"Data": {}, "Code": 0}, said(-1))
    assert ears.causes == ["malformed"]


async def test_a_number_that_stays_where_it_is() -> None:
    """New events at an old place would be taken for old ones: they get another."""
    ears = Ears()
    server = await all_asked(ears, said(5, "Ringing"), said(5, "Connected"), said(6, "Hungup"))
    assert ears.statuses() == ["Ringing", "Connected", "Hungup"]
    assert [each["lastSequenceNumber"] for each in server.asked] == ["0", "5", "0", "6"]


async def test_a_number_beyond_all_places() -> None:
    """Is no place, and what came with it is heard."""
    ears = Ears()
    await all_asked(ears, said(2**62, "Ringing"), said(2**62, "Connected"))
    assert ears.statuses() == ["Ringing", "Connected"]
    assert all(0 < each.position < 2**63 for each in ears.events)


async def test_a_reply_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a gap, and given up like one that makes no sense."""
    monkeypatch.setattr(noojee, "REPLY_BYTES_MAX", 2_000)
    ears = Ears()
    large = said(5, *["Ringing"] * 100)
    server = await all_asked(ears, large, large, large, said(6, "Hungup"))
    assert [each["lastSequenceNumber"] for each in server.asked] == ["0", "0", "0", "0", "6"]
    assert ears.causes == ["oversized", ""]
    assert ears.statuses() == ["Hungup"]


async def test_places_grow() -> None:
    """Within one generation a later event has a later position, also of another extension."""
    ears = Ears()
    await all_asked(ears, said(2), said(5, "a", "b", "c"), said(6, "d"), said(9, "e", extension="205"))
    assert [each.position for each in ears.events] == [
        *(2 * EVENTS_MAX + 1, 2 * EVENTS_MAX + 2, 2 * EVENTS_MAX + 3),
        *(5 * EVENTS_MAX + 1, 6 * EVENTS_MAX + 1),
    ]
    assert len({each.stream for each in ears.events}) == 2


# ── To the store ──────────────────────────────────────────────────────────────────────────────────────


class Wired(Ears):
    """Ears that take everything to a pipeline, as the daemon does."""

    def __init__(self, pipeline: Pipeline, account: int) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.account = account

    async def hear(self, events: Sequence[NoojeeHeard], committed: Callable[[], None]) -> None:
        """To the journal."""
        self.events += events
        await self.pipeline.hear([each.heard(self.account) for each in events], committed)


async def test_calls_stand_in_the_table_as_they_happened(journal: Journal, sql: asyncpg.Connection) -> None:
    """Through the pipeline to PostgreSQL, with replies that break and a listener that is killed and begins
    again: each call once, with its states in order."""
    mix = {"transferred": 1, "not_answered": 1}
    place: NoojeePlace | None = None
    async with NoojeeServer(time_scale=FAST, seed=11, mix=mix) as server:
        for part in range(4):
            place = await _part_of_a_run(server, journal, place, part)
            server.faults.at_random({"cut_during": 0.2, "cut_before": 0.2, "nonsense": 0.1}, on="subscribe")
    rows = await sql.fetch("SELECT id, call_id, state, outcome, direction, number FROM call")
    assert {row["call_id"]: (row["state"], row["outcome"], row["number"]) for row in rows} == {
        call.unique_call_id: (
            "Released",
            "answered" if call.known == "answered" else "unanswered",
            call.number,
        )
        for call in server.calls
    }
    assert {row["direction"] for row in rows} == {"outbound"}
    states = await sql.fetch(
        "SELECT call_id, array_agg(after #>> '{}' ORDER BY notification_id) AS states"
        " FROM change WHERE field = 'state' GROUP BY call_id"
    )
    words = {"Dialing Out": "Dialing", "Connected": "Established", "Hungup": "Released"}
    names = {row["id"]: row["call_id"] for row in rows}
    assert {names[row["call_id"]]: row["states"] for row in states} == {
        call.unique_call_id: [words.get(status, status) for status in call.statuses] for call in server.calls
    }


async def _part_of_a_run(
    server: NoojeeServer, journal: Journal, place: NoojeePlace | None, part: int
) -> NoojeePlace:
    """Hears some calls from a place on; all parts but the first and the last are killed in the middle."""
    pipeline = Pipeline(journal, Counts())
    ears = Wired(pipeline, 1)
    async with running(pipeline), hearing(events_of(server.url, ears, place=place), "204"):
        await until(lambda: "" in ears.causes)
        for number in range(8 if part else 1):
            await dial(server, number=f"03{part:02}{number:06}")
        if part in (0, 3):
            await server.idle()
            await until(lambda: bool(ears.kept) and ears.kept[-1].seq == server.seq)
        else:
            await until(lambda: len(ears.events) >= 8)
    kept = ears.kept[-1] if ears.kept else place
    assert kept is not None
    return kept


# ── What can be known ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("script", sorted(name for name, how in SCRIPTS.items() if not how.inbound))
async def test_a_dial_ends_as_its_events_prove(script: str) -> None:
    """Every script of the simulator, by what is heard of it alone: its outcome, or unknown."""
    ears = Ears()
    async with NoojeeServer(scripts={NUMBER: script}, time_scale=FAST) as server:
        async with hearing(events_of(server.url, ears), "204"):
            await until(lambda: "" in ears.causes)
            await dial(server)
            await server.idle()
            await until(lambda: len(ears.statuses()) == len(server.calls[0].statuses))
        at = datetime.now(UTC)  # noqa: TID251 - the simulator's own
        dialled = advance(
            placed("d1", 1, System.NOOJEE, NUMBER, at, device="SIP/204"), Accepted("1"), at
        ).dial
        for each in ears.events:
            assert each.event is not None
            seen = noojee_sighting(each.event, each.received_at, 1)
            assert dialled.call is not None or match([dialled], seen).dial is not None
            dialled = advance(dialled, noojee_fact(each.event), each.received_at).dial
        if dialled.deadline_at is not None:
            dialled = advance(dialled, Elapsed(), dialled.deadline_at).dial
        assert dialled.outcome == server.calls[0].known
