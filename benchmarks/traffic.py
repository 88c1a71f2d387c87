"""Made-up traffic for the benchmarks: calls of one shape, ten messages each, 500 of them live at a time.

The messages have the fields, the nesting and the size (about 1.2 KB) that GWS 8.5.2 documents for
`/v2/me/calls`: one call is rung, has data attached, is answered, is recorded, changes its data, is held and
retrieved, and ends. Everything comes from one seed, so that each arm of a benchmark gets the same bytes.
"""

import json
import random
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from listener.core.calls import Heard

MESSAGES_PER_CALL = 10
LIVE_CALLS = 500
CHANNEL = "/v2/me/calls"

_BEGAN_AT = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)
_USER_DATA_OPS = ["AttachUserData", "UpdateUserData", "DeleteUserData", "DeleteUserDataPair"]
_TALKING = ["Hangup", "Hold", "SendDtmf", "SingleStepTransfer", "InitiateTransfer", "InitiateConference",
            "StartCallRecording", *_USER_DATA_OPS]  # fmt: skip
_SCRIPT: tuple[tuple[str, str, list[str]], ...] = (
    ("StatusChange", "Ringing", ["Answer", "ClearCall", *_USER_DATA_OPS]),
    ("AttachedDataChanged", "Ringing", ["Answer", "ClearCall", *_USER_DATA_OPS]),
    ("StatusChange", "Established", _TALKING),
    ("CallRecordingStateChange", "Established", [*_TALKING[:6], "StopCallRecording", *_USER_DATA_OPS]),
    ("AttachedDataChanged", "Established", [*_TALKING[:6], "StopCallRecording", *_USER_DATA_OPS]),
    ("StatusChange", "Held", ["Retrieve", "Hangup", *_USER_DATA_OPS]),
    ("StatusChange", "Established", [*_TALKING[:6], "StopCallRecording", *_USER_DATA_OPS]),
    ("DtmfSent", "Established", [*_TALKING[:6], "StopCallRecording", *_USER_DATA_OPS]),
    ("AttachedDataChanged", "Established", [*_TALKING[:6], "StopCallRecording", *_USER_DATA_OPS]),
    ("StatusChange", "Released", []),
)


class _MadeCall:
    """One scripted call: what stays the same in its ten messages, and how far it has come."""

    def __init__(self, dice: random.Random, account: int) -> None:
        self.account = account
        self.step = 0
        self.id = "".join(dice.choices("0123456789ABCDEFGHIJKLMNOPQRSTUV", k=32))
        self.conn_id = f"{dice.getrandbits(64):016x}"
        self.number = f"+1916555{dice.randrange(10_000):04d}"
        self.dn = str(5000 + account)
        self.device = str(uuid.UUID(int=dice.getrandbits(128)))
        self.began_ms = 1_772_438_400_000 + dice.randrange(3_600_000)
        self.user_data: dict[str, object] = {
            "IW_CaseUid": str(uuid.UUID(int=dice.getrandbits(128))),
            "AccountNumber": str(dice.randrange(10**8)),
            "Segment": dice.choice(["gold", "silver", "bronze"]),
        }

    def next(self, dice: random.Random) -> bytes:
        """The next of its ten messages."""
        kind, state, capabilities = _SCRIPT[self.step]
        if kind == "AttachedDataChanged":
            self.user_data[f"Step{self.step}"] = f"note {dice.randrange(10**6)}"
        self.step += 1
        seconds = self.step * 7
        call: dict[str, object] = {
            "id": self.id,
            "state": state,
            "callUuid": self.id,
            "connId": self.conn_id,
            "deviceUri": f"http://192.0.2.54:8090/api/v2/devices/{self.device}",
            "participants": [
                {
                    "e164Number": self.number,
                    "formattedPhoneNumber": self.number,
                    "phoneNumber": self.number,
                    "digits": self.number[1:],
                }
            ],
            "dnis": self.dn,
            "callType": "Inbound",
            "capabilities": dice.sample(capabilities, len(capabilities)),
            "userData": dict(self.user_data),
            "duration": str(seconds),
            "mute": "Off",
            "supervisorListeningIn": False,
            "monitoredUserMuted": False,
            "monitoring": False,
            "uri": f"http://192.0.2.54:8090/api/v2/me/calls/{self.id}",
            "path": f"/calls/{self.id}",
        }
        if self.step >= 4:
            call["recordingState"] = "Recording"
        data: dict[str, object] = {
            "notificationType": kind,
            "call": call,
            "phoneNumber": self.dn,
            "messageType": "CallStateChangeMessage",
            "metrics": {
                "eventProcessing": {
                    "nodeProcessingTimeNanos": dice.randrange(10**6),
                    "serverGenerationTimestamp": self.began_ms + seconds * 1000,
                    "serverProcessingTimeTotalMs": 0,
                }
            },
        }
        if kind == "StatusChange":
            data["extensions"] = {"BusinessCall": 1, "OriginationDN": self.number, "WrapUpTime": 0}
        return json.dumps({"data": data, "channel": CHANNEL}, separators=(",", ":")).encode()


def traffic(messages: int, *, accounts: int, seed: int = 1) -> Iterator[Heard]:
    """Messages in the order in which they are heard, calls of all accounts mixed; account ids from 1."""
    dice = random.Random(seed)
    streams = [str(uuid.UUID(int=dice.getrandbits(128))) for _ in range(accounts)]
    positions = [0] * accounts
    live: list[_MadeCall] = []
    for count in range(messages):
        while len(live) < LIVE_CALLS:
            live.append(_MadeCall(dice, dice.randrange(accounts)))
        place = dice.randrange(LIVE_CALLS)
        call = live[place]
        raw = call.next(dice)
        if call.step == MESSAGES_PER_CALL:
            live[place] = live[-1]
            live.pop()
        positions[call.account] += 1
        yield Heard(
            account=call.account + 1,
            stream=streams[call.account],
            position=positions[call.account],
            received_at=_BEGAN_AT + timedelta(milliseconds=count),
            channel=CHANNEL,
            raw=raw,
        )
