"""Click2Dial: what its statuses mean. What a dial does in trouble is in test_dialling.py."""

import pytest

from listener.adapters.click2dial import Click2Dial
from listener.core.dialling import Accepted, Cause, Refused, System
from listener.core.requests import Click2DialCall
from tests.support.party import party, says

CALL = Click2DialCall(agent="201", callee="0820001234", outbound_id="27110001234", reference="r-1")


@pytest.mark.parametrize("status", [200, 201, 202, 204])
@pytest.mark.parametrize("body", ["", "queued", '{"error": "none documented"}'])
async def test_any_2xx_is_an_acknowledgement(status: int, body: str) -> None:
    """The reply is documented nowhere, so its body decides nothing."""
    async with party(says(status, "" if status == 204 else body)) as there:
        assert await Click2Dial(there.url).dial(CALL) == Accepted()
    assert there.seen == [("POST", "/click2dial/calls")]


@pytest.mark.parametrize("status", [300, 400, 404, 422, 500, 503])
async def test_any_other_status_is_none(status: int) -> None:
    """Its words are kept."""
    async with party(says(status, "callee: not allowed", "text/plain")) as there:
        fact = await Click2Dial(there.url + "/").dial(CALL)
        assert there.seen == [("POST", "/click2dial/calls")]
    assert isinstance(fact, Refused)
    assert (fact.cause.system, fact.cause.field, fact.cause.code) == (System.CLICK2DIAL, "http", str(status))
    if status >= 400:
        assert fact == Refused(Cause(System.CLICK2DIAL, "http", str(status), "callee: not allowed"))
