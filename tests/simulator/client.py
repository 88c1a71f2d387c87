"""A Bayeux client of a few lines, for the tests of the simulator: it sends what it is told and hides
nothing. It is no listener: no retry, no back-off, no judgement."""

import json
from types import TracebackType
from typing import Any, Self

import aiohttp

Json = dict[str, Any]


def basic(login: str, password: str = "simulated") -> dict[str, str]:
    """The header of a Basic login."""
    return {"Authorization": aiohttp.encode_basic_auth(login, password)}


class BayeuxClient:
    """One client with its own cookies; with a `login`, Basic goes with every request."""

    def __init__(self, url: str, login: str | None = None, password: str = "simulated") -> None:
        self.url = url
        self.client_id = ""
        self.ack = -1
        self.data: list[Json] = []
        """Every data message that arrived, in order, also those that came again."""
        self.http = aiohttp.ClientSession(
            cookie_jar=aiohttp.CookieJar(unsafe=True),
            headers=basic(login, password) if login else None,
            timeout=aiohttp.ClientTimeout(total=60),
        )
        self._ids = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.http.close()

    async def post(self, *messages: Json) -> tuple[int, bytes]:
        """Send messages as they are; gives the status and the body."""
        async with self.http.post(self.url + "/api/v2/notifications", json=list(messages)) as response:
            return response.status, await response.read()

    def message(self, channel: str, **fields: Any) -> Json:
        """A Bayeux message with an id of its own."""
        self._ids += 1
        client_id = {"clientId": self.client_id} if self.client_id else {}
        return {"channel": channel, "id": str(self._ids), **client_id, **fields}

    async def ask(self, message: Json) -> Json:
        """Send one message; gives its reply, keeps the data that came with it."""
        status, body = await self.post(message)
        assert status == 200, (status, body)
        return self.keep(json.loads(body), message)

    def keep(self, answers: list[Json], message: Json) -> Json:
        """Sort an answer into data, which is kept, and the reply, which is given."""
        replies = [a for a in answers if a["channel"] == message["channel"]]
        self.data += [a for a in answers if not a["channel"].startswith("/meta/")]
        assert len(replies) == 1, answers
        return replies[0]

    async def handshake(self, *, ack: bool = True) -> Json:
        """Begin a session; the client id is kept when there is one."""
        self.client_id = ""
        fields: Json = {"version": "1.0", "supportedConnectionTypes": ["long-polling"]}
        if ack:
            fields["ext"] = {"ack": True}
        reply = await self.ask(self.message("/meta/handshake", **fields))
        self.client_id = reply.get("clientId", "")
        self.ack = -1
        return reply

    async def subscribe(self, *channels: str) -> Json:
        """Subscribe to channels in one message."""
        return await self.ask(self.message("/meta/subscribe", subscription=list(channels)))

    def connect_message(self, **advice: Any) -> Json:
        """A /meta/connect with the last acknowledgement, and advice if any."""
        extra: Json = {"advice": advice} if advice else {}
        return self.message("/meta/connect", connectionType="long-polling", ext={"ack": self.ack}, **extra)

    async def connect(self, **advice: Any) -> Json:
        """One /meta/connect; what it carried is acknowledged with the next."""
        reply = await self.ask(self.connect_message(**advice))
        self.ack = reply.get("ext", {}).get("ack", self.ack)
        return reply

    async def open(self, *channels: str, ack: bool = True) -> Json:
        """Handshake, subscribe (to /v2/me/calls if nothing is said), and the first connect."""
        await self.handshake(ack=ack)
        assert (await self.subscribe(*(channels or ("/v2/me/calls",))))["successful"]
        return await self.connect()
