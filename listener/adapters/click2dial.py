"""Teleforge Click2Dial: create a call.

Facts that this file rests on (vendor's pages): the one REST call is a POST of JSON to `/click2dial/calls`,
over plain HTTP on a port of the integrator's own. Neither a reply's body nor its status, errors or a login
are documented; so HTTP 2xx is an acknowledgement, whatever the body, and anything else is none. There is no
hang-up and no status of a call: after the acknowledgement nothing is heard until the record at its end.
"""

import ssl
from collections.abc import Mapping

from yarl import URL

from listener.adapters.exchange import REQUEST_S, NoAnswer, Secrets, exchange, refusal, unanswered
from listener.core.dialling import Accepted, System
from listener.core.requests import Acknowledgement, Click2DialCall, build


class Click2Dial:
    """One Click2Dial server. `base_url` has the port and no path; `headers` are what a gateway before it
    wants, since the server itself has no login. A request may take `request_s`."""

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str] | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        request_s: float = REQUEST_S,
    ) -> None:
        self._base_url = str(URL(base_url)).rstrip("/")
        self._headers = dict(headers or {})
        self._secrets = Secrets(self._headers.values())
        self._tls = tls
        self._request_s = request_s

    async def dial(self, request: Click2DialCall) -> Acknowledgement:
        """Asks for a call, once; never raises."""
        built = build(request)
        answer = await exchange(
            built.method,
            URL(self._base_url + built.target, encoded=True),
            headers={**self._headers, "Content-Type": built.content_type},
            secrets=self._secrets,
            body=built.body,
            tls=self._tls,
            within_s=self._request_s,
        )
        if isinstance(answer, NoAnswer):
            return unanswered(System.CLICK2DIAL, answer)
        if 200 <= answer.status < 300:
            return Accepted()
        return refusal(System.CLICK2DIAL, answer)
