"""What the daemon has of dials, as it is built from settings: against all three systems simulated."""

from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from pydantic import SecretStr

from listener.adapters.noojee import NoojeePlace
from listener.api import Client
from listener.core.dialling import DEADLINES
from listener.dialroom import _Place, deadlines_of
from listener.errors import NotAllowed, NotKnown, SettingsError
from listener.settings import Environment, Limits, NoojeePbx
from tests.support.centres import TOKEN, Centres, centres
from tests.support.running import InProcess, account, until


@pytest.fixture
async def there(redis_url: str) -> AsyncIterator[Centres]:
    """The three systems; the Noojee tells of every extension."""
    async with centres(redis_url) as made:
        for extension in made.extensions:
            made.noojee.monitor(extension)
        yield made


def client_of(listener: InProcess) -> Client:
    """A client of its API."""
    room = listener.daemon._room
    assert room is not None
    return Client(f"http://127.0.0.1:{room.port}", TOKEN)


def test_the_limits_are_the_deadlines() -> None:
    """The defaults of the settings are those of the core, and each setting is its own deadline."""
    assert deadlines_of(Limits()) == DEADLINES
    names = ("requested", "accepted", "silent", "agent", "ringing")
    other = Limits(**{f"dial_{name}_s": place for place, name in enumerate(names, 1)}, dial_s=9)
    told = deadlines_of(other)
    assert (told.requested_s, told.accepted_s, told.silent_s) == (1, 2, 3)
    assert (told.dialing_agent_s, told.dialing_s, told.dial_s) == (4, 5, 9)


async def test_a_site_of_pbxs_alone(there: Centres, database: str, sql: asyncpg.Connection) -> None:
    """Without any GWS they are heard, dialled and covered; with nothing at all it does not start."""
    settings = there.settings(database, accounts=(), environments={})
    async with InProcess(settings).running() as listener, client_of(listener) as client:
        assert await listener.ready()
        dial = await client.dial("noojee", number="0383208100", extenOrUniqueId="SIP/101")
        told = [each async for each in client.follow(dial["id"], poll_s=0.02)][-1]
        assert told["account"] == "desk101"
        covered = "SELECT count(*) FROM coverage WHERE cause = '' AND until IS NULL"
        assert await sql.fetchval(covered) == len(there.extensions) + len(there.desks)
    assert await sql.fetchval(covered) == 0
    nothing = there.settings(database, accounts=(), environments={}, noojee={}, click2dial={})
    with pytest.raises(ExceptionGroup) as refused:
        async with InProcess(nothing).running():
            pass
    assert refused.group_contains(SettingsError, match="there are no accounts")


async def test_a_pbx_that_is_not_heard_is_said(
    there: Centres, database: str, sql: asyncpg.Connection
) -> None:
    """/-/ready gives the reason, and the coverage of its extensions the gap, until it is heard."""
    office = NoojeePbx(
        base_url=there.noojee.url, api_key=SecretStr("wrong"), extensions=there.extensions, dials=True
    )
    settings = there.settings(database, noojee={"office": office})
    async with InProcess(settings).running(up=False) as listener:
        await until(lambda: any("office: login refused" in each for each in listener.daemon.not_ready()))
        causes = (
            "SELECT DISTINCT cause FROM coverage c JOIN account a ON a.id = c.account_id"
            " WHERE a.environment = 'office' AND until IS NULL"
        )

        async def said() -> bool:
            return [row[0] for row in await sql.fetch(causes)] == ["login refused"]

        await until(said)
        there.noojee.api_key = "wrong"
        await until(lambda: not listener.daemon.not_ready())


async def test_a_dial_goes_on_over_a_restart(there: Centres, database: str) -> None:
    """What a Noojee said while nobody listened is heard by the next start, from where the last one was."""
    there.noojee.scripts["0383208100"] = "answered"
    there.noojee._time_scale = 0.1
    settings = there.settings(database)
    async with InProcess(settings).running() as listener, client_of(listener) as client:
        dial = await client.dial("noojee", number="0383208100", extenOrUniqueId="SIP/101")
        async for told in client.follow(dial["id"], poll_s=0.02):
            if told["state"] == "dialing":
                break
    (call,) = there.noojee.calls
    assert not call.ended
    await until(lambda: call.ended)
    # Who asks from the beginning is told only what is live now: this one.
    there.noojee._time_scale = 1.0
    there.noojee.call("102", "answered")
    await until(lambda: there.noojee.calls[-1].status == "Dialing Out")
    async with InProcess(settings).running() as listener, client_of(listener) as client:
        told = [each async for each in client.follow(dial["id"], poll_s=0.02)][-1]
        assert (told["outcome"], told["expired"]) == ("answered", False)
    assert [each.number for each in there.noojee.calls].count("0383208100") == 1


async def test_an_overheard_dial_has_its_deadline_too(
    there: Centres, database: str, sql: asyncpg.Connection
) -> None:
    """As the settings have it: it ends as unknown long before its call does."""
    there.noojee._time_scale = 0.5
    settings = there.settings(database, limits={"dial_ringing_s": 0.5})
    async with InProcess(settings).running():
        call = there.noojee.call("101", "not_answered", "0299990001")
        ended = "SELECT outcome = 'unknown' AND expired FROM dial WHERE number = '0299990001'"

        async def over() -> bool:
            return bool(await sql.fetchval(ended))

        await until(over)
        assert not call.ended


async def test_a_reload_says_who_may_dial(there: Centres, database: str) -> None:
    """Switched off it is refused, and switched on again it is done; PBXs follow at the next start."""
    async with InProcess(there.settings(database)).running() as listener, client_of(listener) as client:
        assert (await client.dial("gws", account="agent5000", number="5001"))["state"] == "requested"
        quiet = {"lab": Environment(base_url=there.gws.url)}
        listener.settings = there.settings(database, environments=quiet)
        listener.daemon.reload()
        await until(lambda: listener.daemon.settings is listener.settings)
        with pytest.raises(NotAllowed, match="set dials = true"):
            await client.dial("gws", account="agent5000", number="5001")
        listener.settings = there.settings(database, accounts=(account("agent5001"),))
        listener.daemon.reload()
        await until(lambda: listener.daemon.settings is listener.settings)
        with pytest.raises(NotKnown, match="no account 'agent5000'; known are agent5001"):
            await client.dial("gws", account="agent5000", number="5001")


def test_a_place_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    """It costs nothing: without one the server says what is live now. What is kept is read again."""
    kept = _Place(tmp_path / "deep" / "noojee-office.place")
    assert kept.read() is None
    kept.write(NoojeePlace("g", 7))
    assert kept.read() == NoojeePlace("g", 7)
    for broken in ("", "{", "[]", '{"seq": 7}', '{"generation": "g", "seq": "x"}'):
        (tmp_path / "deep" / "noojee-office.place").write_text(broken)
        assert kept.read() is None
