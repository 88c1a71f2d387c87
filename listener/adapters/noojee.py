"""Noojee Contact's CallManagementAPI: dial, hang up, answer, start and stop recording.

Facts that this file rests on (vendor's pages): every operation is a POST with its arguments in the query and
an empty body; the API key is one of those arguments, so that a URL must never be shown; every reply has a
`Code`, 0 for success, negative for an error, positive for a notice; start and stop recording answer HTTP 200
or an error. `Code` 0 to a dial means that it was queued, and no more: what becomes of it is heard from
subscribe.
"""

import ssl
from urllib.parse import quote_plus

import structlog
from yarl import URL

from listener.adapters.exchange import REQUEST_S, Answer, NoAnswer, Secrets, exchange, refusal, unanswered
from listener.core.dialling import Accepted, Cause, Refused, System
from listener.core.requests import (
    Acknowledgement,
    NoojeeAnswer,
    NoojeeDial,
    NoojeeHangup,
    NoojeeStartRecording,
    NoojeeStopRecording,
    build,
)


class Noojee:
    """One Noojee server. `base_url` is the server without a path; `api_key` is a global key (a user key has
    no access to calls). A request may take `request_s`. No method raises, and none asks twice."""

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        tls: ssl.SSLContext | None = None,
        request_s: float = REQUEST_S,
    ) -> None:
        self._base_url = str(URL(base_url)).rstrip("/")
        self._api_key = api_key
        self._secrets = Secrets([api_key])
        self._tls = tls
        self._request_s = request_s

    async def dial(self, request: NoojeeDial) -> Acknowledgement:
        """Asks for a call. Accepted carries the SessionID, which matches nothing that is heard later."""
        return self._acknowledgement(await self._send(request))

    async def hangup(self, request: NoojeeHangup) -> Acknowledgement:
        """Asks for a call to be hung up."""
        return self._acknowledgement(await self._send(request))

    async def answer(self, request: NoojeeAnswer) -> Acknowledgement:
        """Asks a handset to answer."""
        return self._acknowledgement(await self._send(request))

    async def start_recording(self, request: NoojeeStartRecording) -> Acknowledgement:
        """Asks for a call to be recorded."""
        return self._acknowledgement(await self._send(request), by_status=True)

    async def stop_recording(self, request: NoojeeStopRecording) -> Acknowledgement:
        """Asks for no more recording."""
        return self._acknowledgement(await self._send(request), by_status=True)

    async def _send(
        self, request: NoojeeDial | NoojeeHangup | NoojeeAnswer | NoojeeStartRecording | NoojeeStopRecording
    ) -> Answer | NoAnswer:
        built = build(request)
        return await exchange(
            built.method,
            URL(f"{self._base_url}{built.target}&apiKey={quote_plus(self._api_key)}", encoded=True),
            headers={"Content-Type": built.content_type},
            secrets=self._secrets,
            body=built.body,
            tls=self._tls,
            within_s=self._request_s,
        )

    def _acknowledgement(self, answer: Answer | NoAnswer, *, by_status: bool = False) -> Acknowledgement:
        """What was said; `by_status`: HTTP 200 alone is success."""
        if isinstance(answer, NoAnswer):
            return unanswered(System.NOOJEE, answer)
        code, message = answer.integer("Code"), answer.json().get("Message")
        text = self._secrets.one_line(message) if isinstance(message, str) else ""
        if code is not None and code < 0:
            return Refused(Cause(System.NOOJEE, "Code", str(code), text))
        if answer.status >= 300:
            return refusal(System.NOOJEE, answer)
        if code is None and not by_status:
            return unanswered(System.NOOJEE, answer)
        if code:
            structlog.get_logger().warning("noojee accepted with a notice", code=code, message=text)
        session = answer.integer("SessionID")
        return Accepted(None if session is None else str(session))
