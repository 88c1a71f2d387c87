"""Noojee: each operation, and what its replies mean. What a dial does in trouble is in test_dialling.py."""

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from listener.adapters.noojee import Noojee
from listener.core.dialling import Accepted, Cause, NotAnswered, Outcome, Refused, System, meaning
from listener.core.requests import (
    NoojeeAnswer,
    NoojeeDial,
    NoojeeHangup,
    NoojeeStartRecording,
    NoojeeStopRecording,
)
from listener.simulator.noojee import NoojeeServer
from tests.support.party import cut, party, says

PATH = "/servicemanager/rest/CallManagementAPI/"
KEY = "0f3a-made-up-key"

OPERATIONS: dict[str, tuple[Any, str]] = {
    "dial": (
        NoojeeDial(number="0383200000", exten_or_unique_id="SIP/201", monitored=True),
        "dial?number=0383200000&extenOrUniqueId=SIP/201&monitored=yes",
    ),
    "hangup": (NoojeeHangup(exten_or_unique_id="1543022361.57"), "hangup?extenOrUniqueId=1543022361.57"),
    "answer": (
        NoojeeAnswer(unique_id="1543022361.57", exten="SIP/201"),
        "answer?uniqueId=1543022361.57&exten=SIP/201",
    ),
    "start_recording": (
        NoojeeStartRecording(exten_or_unique_id="411", tag="T 1"),
        "start?extenOrUniqueId=411&tag=T+1",
    ),
    "stop_recording": (
        NoojeeStopRecording(exten_or_unique_id="411", agent_login_name="Ann"),
        "stop?extenOrUniqueId=411&agentLoginName=Ann",
    ),
}
RECORDINGS = ("start_recording", "stop_recording")


async def ask(url: str, operation: str) -> Any:
    """Asks for the operation of that name."""
    return await getattr(Noojee(url, KEY), operation)(OPERATIONS[operation][0])


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_each_operation_is_one_post(operation: str) -> None:
    """Arguments and key in the query, and Code 0 is success."""
    async with party(says(200, '{"Message": "Done", "Code": 0}')) as there:
        assert await ask(there.url + "/", operation) == Accepted()
    assert there.seen == [("POST", f"{PATH}{OPERATIONS[operation][1]}&apiKey={KEY}")]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("status", [200, 401, 500, 502])
async def test_a_negative_code_refuses_whatever_the_status(operation: str, status: int) -> None:
    """It is the party's own word."""
    async with party(says(status, '{"Message": "Expired TimeStamp", "Code": -1}')) as there:
        fact = await ask(there.url, operation)
    assert fact == Refused(Cause(System.NOOJEE, "Code", "-1", "Expired TimeStamp"))
    assert meaning(fact.cause).outcome is Outcome.NOT_ALLOWED


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_notice_is_success_and_is_logged(operation: str) -> None:
    """A positive code warns of something, and the message says of what."""
    async with party(says(200, f'{{"Message": "Slow trunk {KEY}", "Code": 3}}')) as there:
        with capture_logs() as logs:
            assert await ask(there.url, operation) == Accepted()
    (entry,) = logs
    assert (entry["log_level"], entry["code"], entry["message"]) == ("warning", 3, "Slow trunk ***")


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_refusal_that_names_the_key_is_a_refused_login(operation: str) -> None:
    """No list of codes exists; the parameter's name in the message is what there is to go by."""
    async with party(says(200, f'{{"Message": "apiKey {KEY} is unknown", "Code": -4}}')) as there:
        fact = await ask(there.url, operation)
    assert fact == Refused(Cause(System.NOOJEE, "login", "", "Code -4 apiKey *** is unknown"))
    assert meaning(fact.cause).outcome is Outcome.NOT_ALLOWED


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_each_operation_at_the_simulated_pbx(operation: str) -> None:
    """A server that checks names and key, and does what it is asked to do."""
    async with NoojeeServer(api_key=KEY, time_scale=1000) as pbx:
        noojee = Noojee(pbx.url, KEY)
        call = pbx.call("411", "inbound_answered")
        async with asyncio.timeout(5):
            while call.status != "Ringing":  # noqa: ASYNC110 - the call begins in a task of the simulator
                await asyncio.sleep(0.001)
        request = {
            "dial": NoojeeDial(number="102", exten_or_unique_id="SIP/412"),
            "hangup": NoojeeHangup(exten_or_unique_id=call.unique_call_id),
            "answer": NoojeeAnswer(unique_id=call.unique_call_id, exten="SIP/411"),
            "start_recording": NoojeeStartRecording(exten_or_unique_id="411"),
            "stop_recording": NoojeeStopRecording(exten_or_unique_id="411"),
        }[operation]
        fact = await getattr(noojee, operation)(request)
        assert fact == Accepted("1" if operation == "dial" else None)
        assert call.ended == (operation == "hangup")
        wrong = await getattr(Noojee(pbx.url, "another key"), operation)(request)
    assert (wrong.cause.field, wrong.cause.text) == ("login", "Code -1 Invalid apiKey")


async def test_success_is_not_logged() -> None:
    """Nothing to say."""
    async with party(says(200, '{"Code": 0}')) as there:
        with capture_logs() as logs:
            await ask(there.url, "dial")
    assert logs == []


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "body", ["", "OK", '{"code": 0}', '{"Code": null}'], ids=["empty", "text", "lower case", "null"]
)
async def test_recordings_go_by_the_status(operation: str, body: str) -> None:
    """They "return HTTP 200 on success"; to the others a reply without Code is no answer."""
    async with party(says(200, body)) as there:
        fact = await ask(there.url, operation)
    if operation in RECORDINGS:
        assert fact == Accepted()
    else:
        assert isinstance(fact, NotAnswered)
        assert fact.sent


@pytest.mark.parametrize("operation", RECORDINGS)
async def test_a_recording_is_refused_by_the_status(operation: str) -> None:
    """The error message is kept."""
    async with party(says(404, "No call on 411", "text/plain")) as there:
        fact = await ask(there.url, operation)
    assert fact == Refused(Cause(System.NOOJEE, "http", "404", "No call on 411"))


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_no_operation_is_asked_for_twice(operation: str) -> None:
    """Also a hang-up may meet another call the second time."""
    async with party(cut(b"")) as there:
        fact = await ask(there.url, operation)
    assert isinstance(fact, NotAnswered)
    assert fact.sent
    assert len(there.seen) == 1


@pytest.mark.parametrize(
    ("session", "kept"), [("7", "7"), ('"7"', None), ("null", None), ("true", None), ("-1", "-1")]
)
async def test_the_session_of_a_dial(session: str, kept: str | None) -> None:
    """SessionID is an integer in the vendor's sample; anything else is none."""
    async with party(says(200, f'{{"SessionID": {session}, "Code": 0}}')) as there:
        assert await ask(there.url, "dial") == Accepted(kept)


async def test_a_code_of_zero_does_not_mend_a_bad_status() -> None:
    """HTTP 300 and above is an error (the taxonomy's row for Noojee)."""
    async with party(says(500, '{"Message": "Originate successfully queued", "Code": 0}')) as there:
        fact = await ask(there.url, "dial")
    assert (fact.cause.field, fact.cause.code) == ("http", "500")
