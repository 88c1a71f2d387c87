"""Answers that go wrong at a simulated PBX: what is carried out, and what arrives."""

import aiohttp
import pytest

from listener.errors import SettingsError
from listener.simulator.noojee import API, NoojeeServer
from listener.simulator.party import NOT_CARRIED_OUT, ExchangeFault, ExchangeFaults

QUERY = {"number": "0383200417", "extenOrUniqueId": "SIP/204", "apiKey": "simulated-key"}


async def dialled(server: NoojeeServer, within_s: float = 5.0) -> str:
    """What a plain client makes of one dial."""
    timeout = aiohttp.ClientTimeout(total=within_s)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as http,
            http.post(server.url + API + "dial", params=QUERY, allow_redirects=False) as response,
        ):
            return f"{response.status} {await response.text()}"
    except TimeoutError:
        return "time-out"
    except aiohttp.ClientPayloadError:
        return "cut in the body"
    except aiohttp.ClientError:
        return "cut"


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        (ExchangeFault.REFUSE, '200 {"Message":"Refused","Code":-1}'),
        (ExchangeFault.STATUS, "500 out of order"),
        (ExchangeFault.REDIRECT, "302 "),
        (ExchangeFault.UNHEARD, "cut"),
        (ExchangeFault.CUT_BEFORE, "cut"),
        (ExchangeFault.CUT_DURING, "cut in the body"),
        (ExchangeFault.CUT_AFTER, '200 {"SessionID":1,'),
        (ExchangeFault.NONSENSE, "200 <html>"),
        (ExchangeFault.SLOW, '200 {"SessionID":1,'),
    ],
)
async def test_each_fault(kind: ExchangeFault, seen: str) -> None:
    """It hits once, and the call is made or not as the fault says."""
    async with NoojeeServer(mix={"silent": 1}) as server:
        server.faults.arm(kind, on="dial", seconds=0.01)
        assert (await dialled(server)).startswith(seen)
        assert len(server.calls) == (0 if kind in NOT_CARRIED_OUT else 1)
        assert server.faults.struck == {kind: 1}
        assert (await dialled(server)).startswith('200 {"SessionID":')
        assert server.exchanges == {"dial": 2}


async def test_a_slow_answer_is_as_late_as_it_is_told() -> None:
    """A client that waits no longer has nothing, and the call is made."""
    async with NoojeeServer(mix={"silent": 1}) as server:
        server.faults.arm("slow", seconds=30.0)
        assert await dialled(server, 0.1) == "time-out"
        assert len(server.calls) == 1


def test_faults_from_a_seed() -> None:
    """The same seed hits the same requests, only those that are meant, and none after `clear`."""
    drawn = []
    for _ in range(2):
        faults = ExchangeFaults(3)
        faults.at_random({"refuse": 0.2, "slow": 0.2}, on="dial")
        assert all(faults.take("subscribe") is None for _ in range(50))
        drawn.append([fault.kind if (fault := faults.take("dial")) else None for _ in range(100)])
        faults.clear()
        assert all(faults.take("dial") is None for _ in range(50))
    assert drawn[0] == drawn[1]
    assert 20 <= sum(kind is not None for kind in drawn[0]) <= 60


def test_a_fault_that_there_is_not() -> None:
    """Is named, with those that there are."""
    faults = ExchangeFaults(1)
    with pytest.raises(SettingsError, match="cut_during"):
        faults.arm("melt")
    with pytest.raises(SettingsError, match="cut_during"):
        faults.at_random({"melt": 1.0})
    with pytest.raises(SettingsError, match="at most 1"):
        faults.at_random({"slow": 0.7, "refuse": 0.7})
