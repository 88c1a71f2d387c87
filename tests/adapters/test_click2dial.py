"""Click2Dial: what its statuses mean. What a dial does in trouble is in test_dialling.py."""

import pytest
from msgspec import structs

from listener.adapters.click2dial import Click2Dial
from listener.core.dialling import Accepted, Cause, Refused, System
from listener.core.requests import Click2DialCall
from listener.simulator.click2dial import Click2DialServer
from tests.support.party import party, says

CALL = Click2DialCall(agent="201", callee="0820001234", outbound_id="27110001234", reference="r-1")


@pytest.mark.parametrize("status", [200, 201, 202, 204])
@pytest.mark.parametrize("body", ["", "queued", '{"error": "none documented"}'])
async def test_any_2xx_is_an_acknowledgement(status: int, body: str) -> None:
    """The reply is documented nowhere, so its body decides nothing."""
    async with party(says(status, "" if status == 204 else body)) as there:
        assert await Click2Dial(there.url).dial(CALL) == Accepted()
    assert there.seen == [("POST", "/click2dial/calls")]


@pytest.mark.parametrize("before_v3", [False, True])
async def test_a_call_at_the_simulated_pbx(before_v3: bool) -> None:
    """A server of either generation that holds each field to its rule, and finds the reference."""
    async with Click2DialServer(version=2 if before_v3 else 3, time_scale=1000) as pbx:
        call = structs.replace(CALL, before_v3=before_v3)
        assert await Click2Dial(pbx.url).dial(call) == Accepted()
        (made,) = pbx.calls
    assert made.request == {
        "agent": "201",
        "callee": "0820001234",
        "outbound_id": "27110001234",
        "call_ref" if before_v3 else "contact_ref": "r-1",
    }
    assert made.script != "error_28"


@pytest.mark.parametrize("status", [300, 400, 404, 422])
async def test_any_other_status_is_none(status: int) -> None:
    """Its words are kept."""
    async with party(says(status, "callee: not allowed", "text/plain")) as there:
        fact = await Click2Dial(there.url + "/").dial(CALL)
        assert there.seen == [("POST", "/click2dial/calls")]
    assert isinstance(fact, Refused)
    assert (fact.cause.system, fact.cause.field, fact.cause.code) == (System.CLICK2DIAL, "http", str(status))
    if status >= 400:
        assert fact == Refused(Cause(System.CLICK2DIAL, "http", str(status), "callee: not allowed"))
