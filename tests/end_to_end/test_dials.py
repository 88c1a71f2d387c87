"""Dials, from the request to the row: placed by all three systems and overheard, with endings and faults at
random from a seed, against what the simulated systems know that happened.

`DIALS` says how many (2,000, which two quiet cores do in half a minute), `DIALS_SEED` from which seed. Each
account and each extension has one call at a time, as people have.
"""

import asyncio
import json
import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from redis.asyncio import Redis

from listener.api import Client
from listener.core.dialling import REFERENCE_KEY
from listener.errors import ListenerError, RemoteUnavailable, StoreUnavailable
from listener.simulator.click2dial import CDR_LIST
from tests.support.centres import TOKEN, Centres, centres
from tests.support.running import Child, InProcess, child, short_place, until

DIALS = int(os.environ.get("DIALS", "2000"))
SEED = int(os.environ.get("DIALS_SEED", "4"))
WITHIN_s = 480.0
HEARD_s = 60.0
ROW_s = 1.0
"""From the end of a dial to its row and metric."""

LIMITS = {
    "dial_requested_s": 6.0,
    "dial_accepted_s": 6.0,
    "dial_silent_s": 8.0,
    "dial_agent_s": 8.0,
    "dial_ringing_s": 8.0,
    "dial_s": 14.0,
}
FAULTS = {
    "refuse": 0.03,
    "status": 0.01,
    "redirect": 0.005,
    "unheard": 0.01,
    "cut_before": 0.02,
    "cut_during": 0.02,
    "cut_after": 0.02,
    "nonsense": 0.01,
    "slow": 0.01,
}
RECORDS = {"lost": 0.03, "late": 0.05, "twice": 0.05}
OVERHEARD_NOOJEE = ("answered", "not_answered", "callee_busy", "transferred", "unlinked_then_hungup")
UNSAID = {"failed", "unknown"}
"""What a dial may end as that its system did not carry out: it said so, or nothing came."""


@dataclass
class Run:
    """What was asked for, and what became of it."""

    there: Centres
    client: Client
    sql: asyncpg.Pool
    expected: dict[str, Callable[[str], set[str]]] = field(default_factory=dict)
    """By the dial's id, and given it: which outcomes are right, known only afterwards."""
    gws_called: set[str] = field(default_factory=set)
    """The placed dials that GWS was asked for and carried out."""
    ended: dict[str, str] = field(default_factory=dict)
    """The dials that have, with their numbers."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(self) -> None:
        """Looks which dials have ended, until cancelled."""
        while True:
            await asyncio.sleep(0.1)
            rows = await self.sql.fetch("SELECT id, number FROM dial WHERE outcome IS NOT NULL")
            if len(rows) > len(self.ended):
                self.ended = {row["id"]: row["number"] for row in rows}
                self.changed.set()
                self.changed = asyncio.Event()

    async def until_ended(self, id: str) -> None:
        """Waits for the end of one."""
        while id not in self.ended:
            await self.changed.wait()

    async def place(self, right: Callable[[str], set[str]], system: str, **fields: Any) -> None:
        """Places a dial, and waits for its end. Whom a busy machine makes wait too long asks again with the
        same key, as he is told."""
        key, dial = uuid4().hex, None
        while dial is None:
            with suppress(StoreUnavailable, RemoteUnavailable):
                dial = await self.client.dial(system, key=key, **fields)
        self.expected[dial["id"]] = right
        await self.until_ended(dial["id"])


@asynccontextmanager
async def running(
    redis_url: str, database: str, *, lines: int, accounts: int
) -> AsyncIterator[tuple[Run, InProcess]]:
    """A listener in this process that hears and dials by all three systems."""
    async with (
        centres(redis_url, accounts=accounts, lines=lines, seed=SEED) as there,
        asyncpg.create_pool(database, min_size=1, max_size=2) as sql,
        InProcess(there.settings(database, limits=LIMITS)).running() as daemon,
    ):
        room = daemon.daemon._room
        assert room is not None
        async with Client(f"http://127.0.0.1:{room.port}", TOKEN) as client:
            run = Run(there, client, sql)
            async with asyncio.TaskGroup() as tasks:
                following = tasks.create_task(run.follow())
                try:
                    yield run, daemon
                finally:
                    following.cancel()


def of_noojee(there: Centres, number: str) -> Callable[[str], set[str]]:
    """What the events of the call to that number prove."""

    def right(_: str) -> set[str]:
        known = [call.known for call in there.noojee.calls if call.number == number]
        assert len(known) <= 1, f"dialled {len(known)} times: {number}"
        return set(known) if known else UNSAID

    return right


def of_click2dial(there: Centres, callee: str) -> Callable[[str], set[str]]:
    """What the record of the call to that callee proves."""

    def right(_: str) -> set[str]:
        known = [call.known for call in there.click2dial.calls if call.callee == callee]
        assert len(known) <= 1, f"dialled {len(known)} times: {callee}"
        return set(known) if known else UNSAID

    return right


async def by_noojee(run: Run, extension: str, numbers: list[str]) -> None:
    """One extension of Noojee's, one dial after the other."""
    for number in numbers:
        await run.place(
            of_noojee(run.there, number), "noojee", number=number, extenOrUniqueId=f"SIP/{extension}"
        )


async def by_click2dial(run: Run, extension: str, callees: list[str]) -> None:
    """One extension of Click2Dial's."""
    for callee in callees:
        await run.place(
            of_click2dial(run.there, callee),
            "click2dial",
            agent=extension,
            callee=callee,
            outbound_id="27110009000",
        )


async def by_gws(run: Run, login: str, endings: list[tuple[str, set[str]]]) -> None:
    """One account of the GWS."""
    for number, right in endings:
        await run.place(
            lambda id, right=right: right if id in run.gws_called else UNSAID,  # type: ignore[misc]
            "gws",
            account=login,
            number=number,
        )


async def overheard(run: Run, login: str, extension: str, numbers: list[str], rng: Random) -> None:
    """An account and an extension whose agents dial by hand."""
    for number in numbers:
        script = rng.choice(("dial_answered", "dial_busy", "dial_not_answered"))
        run.there.gws.gws.dial(login, f"5{number[1:]}", script)
        run.expected[f"gws {number}"] = lambda _, script=script: (  # type: ignore[misc]
            {"answered"} if script == "dial_answered" else {"unknown"}
        )
        call = run.there.noojee.call(extension, rng.choice(OVERHEARD_NOOJEE), number)
        run.expected[f"noojee {number}"] = lambda _, call=call: {call.known}  # type: ignore[misc]
        await until(lambda call=call: call.ended)
        while not {number, f"5{number[1:]}"} <= set(run.ended.values()):
            await run.changed.wait()


@pytest.mark.timeout(WITHIN_s + 30)
async def test_every_outcome_is_the_scripts_or_unknown(redis_url: str, database: str) -> None:
    """Endings and faults at random: no outcome is wrong, none is lacking, and none is there twice."""
    rng = Random(SEED)
    lines = max(6, DIALS // 16)
    accounts = max(6, DIALS // 50)
    share = DIALS // 20
    async with running(redis_url, database, lines=lines, accounts=accounts) as (run, daemon):
        there = run.there
        for extension in there.extensions:
            there.noojee.monitor(extension)
        there.noojee.faults.at_random(FAULTS, on="dial")
        there.click2dial.faults.at_random(FAULTS, on="calls")
        there.click2dial.records_at_random(RECORDS)
        logins = list(there.gws.accounts)
        mine, theirs = logins[len(logins) // 4 :], logins[: len(logins) // 4]
        desks = list(there.extensions)
        hands, phones = desks[: len(theirs)], desks[len(theirs) :]
        endings: list[tuple[str, set[str]]] = [
            rng.choice(
                [
                    (f"0{number:09d}", {"answered"}),
                    (f"0{number:09d}", {"answered"}),
                    ("5901", {"unknown"}),
                    ("5902", {"unknown"}),
                    ("5903", UNSAID),
                ]
            )
            for number in range(6 * share)
        ]
        numbers = [f"03{number:08d}" for number in range(6 * share)]
        callees = [f"08{number:08d}" for number in range(6 * share)]
        by_hand = [f"04{number:08d}" for number in range(share)]
        async with asyncio.timeout(WITHIN_s), asyncio.TaskGroup() as tasks:
            for place, login in enumerate(mine):
                tasks.create_task(by_gws(run, login, endings[place :: len(mine)]))
            for place, extension in enumerate(phones):
                tasks.create_task(by_noojee(run, extension, numbers[place :: len(phones)]))
            for place, extension in enumerate(there.desks):
                tasks.create_task(by_click2dial(run, extension, callees[place :: len(there.desks)]))
            for place, (login, extension) in enumerate(zip(theirs, hands, strict=True)):
                tasks.create_task(overheard(run, login, extension, by_hand[place :: len(theirs)], rng))
        await _all_heard(there, daemon)
        for call in there.gws.truth().calls:
            run.gws_called |= {str(value) for key, value in call.user_data if key == REFERENCE_KEY}
        rows = await run.sql.fetch(
            "SELECT id, system, origin, number, outcome, corrected FROM dial WHERE merged_into IS NULL"
        )
        wrong, seen = [], Counter[str]()
        for row in rows:
            name = row["id"] if row["origin"] == "placed" else f"{row['system']} {_by_hand(row['number'])}"
            right = run.expected[name](row["id"]) if name in run.expected else set()
            seen[name] += 1
            if row["outcome"] not in right:
                told = await _facts(run, row["id"])
                wrong.append((dict(row), right, told, _calls_to(there, row["number"])))
        assert wrong == [], "\n".join(str(each) for each in wrong)
        assert {name for name in run.expected if seen[name] != 1} == set()
        counted = await _counted(daemon)
        # An end that was corrected is counted as what it was at first.
        first = [{**row, "outcome": "unknown"} if row["corrected"] else row for row in rows]
        assert counted == Counter((row["system"], row["origin"], row["outcome"]) for row in first)
        assert {"answered", "busy", "failed", "unknown", "machine"} <= {row["outcome"] for row in rows}


async def _all_heard(there: Centres, daemon: InProcess) -> None:
    """Waits until all that was said is stored: a machine with other work hears the last of it late."""
    await there.noojee.idle()
    await there.click2dial.idle()
    gws, room = there.gws.gws, daemon.daemon._room
    assert room is not None
    place = daemon.settings.spool_directory() / "noojee-office.place"
    async with Redis.from_url(there.redis_url) as redis:

        async def heard() -> bool:
            records = [await redis.llen(name) for name in (CDR_LIST, f"listener:c2d:{CDR_LIST}")]
            messages = [session.waiting for session in gws.broker.sessions.values()]
            calls = [len(account.playing) for account in gws.accounts.values()]
            seq = json.loads(place.read_bytes())["seq"]
            return not any((*records, *messages, *calls, daemon.backlog)) and seq == there.noojee.seq

        await until(heard, HEARD_s)
    await room.watch.drain()


async def _facts(run: Run, id: str) -> list[str]:
    """What a dial was told, for whoever must find out why its outcome is wrong."""
    rows = await run.sql.fetch("SELECT * FROM dial_fact WHERE dial_id = $1 ORDER BY ordinal", id)
    return [f"{row['at']} {row['kind']} {row['said']} -> {row['state']} {row['outcome']}" for row in rows]


def _calls_to(there: Centres, number: str) -> list[str]:
    """What the simulated PBXs say of the calls to a number."""
    calls = [call for call in there.noojee.calls if call.number == number]
    return [str(call) for call in (*calls, *(c for c in there.click2dial.calls if c.callee == number))]


def _by_hand(number: str) -> str:
    return f"0{number[1:]}" if number.startswith("54") else number


async def _counted(daemon: InProcess) -> Counter[tuple[str, str, str]]:
    """The dials that ended, as the metrics count them."""
    told: Counter[tuple[str, str, str]] = Counter()
    _, text = await daemon.get("/metrics")
    for line in text.splitlines():
        if line.startswith("listener_dials_total{") and not line.endswith(" 0.0"):
            labels = dict(part.split("=") for part in line[line.index("{") + 1 : line.index("}")].split(","))
            key = tuple(labels[name].strip('"') for name in ("system", "origin", "outcome"))
            told[key[0], key[1], key[2]] += int(float(line.rpartition(" ")[2]))
    return told


async def test_an_end_is_a_row_and_a_metric_within_a_second(redis_url: str, database: str) -> None:
    """From what the system says last to the outcome in the database and in /metrics."""
    asked = {
        "gws": {"account": "agent5000", "number": "0123456789"},
        "noojee": {"number": "0300000001", "extenOrUniqueId": "SIP/101"},
        "click2dial": {"agent": "2001", "callee": "0820000001", "outbound_id": "27110009000"},
    }
    async with running(redis_url, database, lines=1, accounts=1) as (run, daemon):
        run.there.noojee.scripts["0300000001"] = "answered"
        run.there.click2dial.scripts["0820000001"] = "answered"
        for system, fields in asked.items():
            dial = await run.client.dial(system, **fields)

            async def counted(system: str = system) -> bool:
                return await daemon.metric("listener_dials_total", system=system) == 1

            async def ended(id: str = dial["id"]) -> Any:
                return await run.sql.fetchval("SELECT ended_at FROM dial WHERE id = $1", id)

            await until(counted)
            late = await run.sql.fetchval("SELECT now() - $1::timestamptz", await ended())
            assert late < timedelta(seconds=ROW_s), system


async def test_a_dial_without_news_ends_at_its_deadline(redis_url: str, database: str) -> None:
    """As unknown, with the reason, when its time is over and not before."""
    async with running(redis_url, database, lines=1, accounts=1) as (run, _):
        run.there.noojee.scripts["0300000002"] = "silent"
        dial = await run.client.dial("noojee", number="0300000002", extenOrUniqueId="SIP/101")
        told = [each async for each in run.client.follow(dial["id"])][-1]
        assert (told["outcome"], told["expired"], told["retry"]) == ("unknown", True, "no")
        assert told["facts"][-1]["kind"] == "elapsed"
        waited = datetime.fromisoformat(told["ended_at"]) - datetime.fromisoformat(told["accepted_at"])
        assert timedelta(seconds=LIMITS["dial_accepted_s"]) <= waited <= timedelta(seconds=8)


@pytest.mark.timeout(120)
async def test_a_kill_in_the_middle_sends_nothing_twice(redis_url: str, database: str) -> None:
    """SIGKILL while dials are being placed, and a start after it: each of them ends, and each number was
    called once at most; asking again with the same key calls nobody again."""
    async with (
        centres(redis_url, accounts=2, lines=20, seed=SEED) as there,
        child_of(there, database) as listener,
    ):
        numbers = [f"03{number:08d}" for number in range(40)]
        asked: list[tuple[str, dict[str, Any]]] = [
            (
                f"key-{number}",
                {"number": number, "extenOrUniqueId": f"SIP/{101 + place % 20}"},
            )
            for place, number in enumerate(numbers)
        ]
        sent = asyncio.Event()

        async def all_of_them(client: Client) -> None:
            for place, (key, fields) in enumerate(asked):
                if place == 15:
                    sent.set()
                with suppress(ListenerError):
                    await client.dial("noojee", key=key, **fields)

        async with Client(await api_of(listener), TOKEN) as client, asyncio.TaskGroup() as tasks:
            tasks.create_task(all_of_them(client))
            await sent.wait()
            await listener.kill()
        before = len(there.noojee.calls)
        assert 0 < before < len(asked)
        await listener.start()
        async with Client(await api_of(listener), TOKEN) as client:
            ids = [(await client.dial("noojee", key=key, **fields))["id"] for key, fields in asked]
            outcomes = {}
            for id, number in zip(ids, numbers, strict=True):
                outcomes[number] = [told async for told in client.follow(id)][-1]["outcome"]
        called = Counter(call.number for call in there.noojee.calls)
        assert max(called.values()) == 1
        for number, outcome in outcomes.items():
            known = {call.known for call in there.noojee.calls if call.number == number}
            assert outcome in known | {"unknown"}


async def api_of(listener: Child) -> str:
    """Where its API is, from its log."""
    found: list[int] = []

    def said() -> bool:
        found[:] = [line["port"] for line in listener.said() if line.get("event") == "dials may be asked for"]
        return bool(found)

    await until(said)
    return f"http://127.0.0.1:{found[0]}"


def configured(there: Centres, database: str) -> Path:
    """A configuration for these systems, in a directory of its own."""
    place = short_place()
    place.mkdir()
    limits = "\n".join(f"{name} = {value}" for name, value in LIMITS.items())
    config = place / "listener.toml"
    config.write_text(there.toml(database, limits))
    return config


@asynccontextmanager
async def child_of(there: Centres, database: str) -> AsyncIterator[Child]:
    """The real command, which hears and dials by these systems."""
    config = configured(there, database)
    try:
        async with child(config) as listener:
            yield listener
    finally:
        shutil.rmtree(config.parent)
