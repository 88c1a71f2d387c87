"""JOINS: what a PBX is heard to say → the journal, the dials, and the coverage of its extensions' accounts.

A PBX is heard as a whole: an adapter (Noojee's events, Click2Dial's records) hands on what it hears of any
extension. This module says whose it is, by the extension, and hands it to two places: to the dials, because
it may be about one that we placed, and to the pipeline, which commits it as a message of that account, with
its exact bytes. The dials come first: who asks again after a crash is told the same again, and both recognise
it. Only then may the adapter let its PBX forget it.

What names no extension that the settings have is kept too, under the PBX's first account: nothing that was
observed is refused. The accounts of a PBX are observed together, and their gaps are those of the PBX. Of one
that dies with us they count as observed up to when the PBX had told everything and all of it was durable.

It refuses to know HTTP, Redis and SQL.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Protocol

import structlog

from listener.core.calls import Cover, Heard
from listener.core.dialling import Dial, Fact, Sighting, extension
from listener.errors import StoreUnavailable

STOPPED = "stopped"

TELL_S = 5.0
"""How long the dials are waited for while the database is away. What they are not told then they are told by
the journal, as far as that says it; a dial that hears of no end has its deadline."""


class Dials(Protocol):
    """`listener.dialwatch.DialWatch`."""

    async def sighted(
        self, seen: Sighting, fact: Fact, at: datetime, *, key: str = "", beside: bool = False
    ) -> Dial | None:
        """Something was learnt of a call. Raises `StoreUnavailable` where too much waits for the store."""


class Hears(Protocol):
    """`listener.pipeline.Pipeline`."""

    async def hear(self, heard: Sequence[Heard], committed: Callable[[], None]) -> None:
        """Takes messages of one account; calls `committed` when they are durable."""


class Covers(Protocol):
    """`listener.coverage.Ledger`."""

    def cover(self, cover: Cover, vouched: Callable[[], datetime | None] = lambda: None) -> None:
        """Takes one turn of coverage."""


class PbxWatch:
    """One PBX. `accounts` are the ids of its accounts by extension, at least one. `answers_s` is how old the
    newest answer of the PBX may be while it is heard; None where `answered` says it. `gap` is told how long
    the accounts were not observed, and why, whenever they are again."""

    def __init__(
        self,
        name: str,
        accounts: Mapping[str, int],
        *,
        dials: Dials,
        pipeline: Hears,
        ledger: Covers,
        answers_s: float | None,
        wall: Callable[[], datetime],
        gap: Callable[[str, float], None] = lambda _cause, _seconds: None,
        since: datetime | None = None,
        tell_s: float = TELL_S,
    ) -> None:
        self.name = name
        self.trouble = "not heard yet"
        """Why it is not heard now; empty when it is."""
        self._accounts = {extension(each): account for each, account in accounts.items()}
        self._dials = dials
        self._pipeline = pipeline
        self._ledger = ledger
        self._answers_s = answers_s
        self._wall = wall
        self._gap = gap
        self._lost_at: datetime | None = since
        self._cause = "not started"
        self._tell_s = tell_s
        self._answered_until: datetime | None = None
        self._takes = 0
        self._undurable: dict[int, datetime | None] = {}
        """Of each take that is not committed, until when all before it was told. As many as the pipeline
        lets in."""
        self._log = structlog.get_logger()

    def account(self, device: str) -> int:
        """Whose an extension is; the first account where the settings do not say."""
        known = self._accounts.get(extension(device))
        return next(iter(self._accounts.values())) if known is None else known

    def knows(self, device: str) -> bool:
        """Whether the settings say whose an extension is."""
        return extension(device) in self._accounts

    async def take(
        self,
        heard: Sequence[Heard],
        news: Sequence[tuple[Sighting, Fact, str, bool]],
        committed: Callable[[], None],
    ) -> None:
        """Takes messages of one account, in order, and what they say of calls: how each may be recognised,
        the fact, what the PBX calls the call, and whether the messages alone make a dial of it where none
        fits. Returns when there is room for more; `committed` is called once all of it is durable."""
        self._takes += 1
        number = self._takes
        self._undurable[number] = self._told_until()

        def durable() -> None:
            self._undurable.pop(number, None)
            committed()

        if news:
            with suppress(TimeoutError, StoreUnavailable):
                async with asyncio.timeout(self._tell_s):
                    await asyncio.gather(
                        *(
                            self._dials.sighted(seen, fact, seen.at, key=key, beside=beside)
                            for seen, fact, key, beside in news
                        )
                    )
        await self._pipeline.hear(heard, durable)

    def answered(self, until: datetime) -> None:
        """Everything that the PBX did until then was given to `take`."""
        self._answered_until = until

    def covered(self, cause: str, detail: str, at: datetime) -> None:
        """From now on the PBX is heard (`cause` empty), or not, and why."""
        if cause == STOPPED:
            self._log.info("a pbx is listened to no more", pbx=self.name)
        elif cause:
            self._log.error("a pbx is not heard", pbx=self.name, cause=cause, detail=detail)
        else:
            self._log.info("a pbx is heard", pbx=self.name)
        if self._lost_at is not None:
            self._gap(self._cause, max(0.0, (at - self._lost_at).total_seconds()) * len(self._ids))
        self._lost_at = at if cause else None
        self._answered_until = None
        self._cause = cause
        self.trouble = f"{cause}: {detail}" if cause else ""
        for account in self._ids:
            self._ledger.cover(Cover(account, at, cause), self._vouched)

    def end(self, at: datetime) -> None:
        """It is listened to no more."""
        self.covered(STOPPED, "the listener stops", at)

    def _vouched(self) -> datetime | None:
        """Until when everything that the PBX did is durable; None if that is not known."""
        return next(iter(self._undurable.values())) if self._undurable else self._told_until()

    def _told_until(self) -> datetime | None:
        if self._answers_s is None:
            return self._answered_until
        return self._wall() - timedelta(seconds=self._answers_s)

    @property
    def _ids(self) -> list[int]:
        return sorted(set(self._accounts.values()))
