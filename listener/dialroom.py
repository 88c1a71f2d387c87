"""Composes what the daemon has of dials: the dial watch, the switchboard, the PBXs that are heard, the API.

It decides who is given to whom and in which order they end; it does nothing itself. The API ends first, so
that nothing more is asked for; then dials that are being sent are waited for; then the PBXs are heard no
more; what was heard is told to the dials last of all. PBXs are as at the start: a reload changes only by
which accounts of a GWS may be dialled.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path

import structlog
from aiohttp.typedefs import Handler

from listener.adapters.click2dial import (
    BLOCK_S,
    READ_MARGIN_S,
    Click2Dial,
    Click2DialHeard,
    Click2DialLists,
    Click2DialWebhook,
)
from listener.adapters.noojee import (
    Noojee,
    NoojeeEvents,
    NoojeeHeard,
    NoojeePlace,
)
from listener.api import Api
from listener.core.dialling import Deadlines, System
from listener.core.pbx import click2dial_fact, click2dial_sighting, noojee_fact, noojee_sighting
from listener.coverage import Ledger
from listener.dialwatch import DialWatch
from listener.metrics import Metrics
from listener.pbxwatch import PbxWatch
from listener.pipeline import Pipeline
from listener.settings import Click2DialPbx, Limits, NoojeePbx, Settings
from listener.store.dialled import DialHistory
from listener.store.dials import Dials
from listener.store.journal import AccountRow, Journal
from listener.switchboard import Click2DialWay, NoojeeWay, Switchboard

SENT_S = 10.0
"""At a stop: how long dials that are being sent are waited for. What is not answered by then is unknown."""


class DialRoom:
    """All of it. Make it with `open`, give it the ways of GWS accounts in `gws`, and `run` it in a task."""

    def __init__(
        self,
        settings: Settings,
        ids: Mapping[str, int],
        journal: Journal,
        dsn: str,
        *,
        metrics: Metrics,
        wall: Callable[[], datetime],
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._dsn = dsn
        self._ids = ids
        self._wall = wall
        self._systems = {
            ids[name]: system
            for pbxs, system in (
                (settings.noojee, System.NOOJEE),
                (settings.click2dial, System.CLICK2DIAL),
            )
            for pbx in pbxs.values()
            for name in pbx.extensions.values()
        }
        deadlines = deadlines_of(settings.limits)
        self.dials = Dials(journal, deadlines)
        self.watch = DialWatch(
            self.dials,
            metrics,
            wall=wall,
            system_of=lambda account: self._systems.get(account, System.GWS),
            clock=clock,
            deadlines=deadlines,
        )
        self.switchboard = Switchboard(
            self.watch,
            self.dials,
            deadlines=deadlines,
            wall=wall,
        )
        self.gws = self.switchboard.gws
        self._metrics = metrics
        self._pbxs: list[PbxWatch] = []
        self._log = structlog.get_logger()
        self.port = 0
        """Of the API, once it serves; 0 where there is none."""

    @classmethod
    async def open(
        cls,
        settings: Settings,
        journal: Journal,
        dsn: str,
        *,
        metrics: Metrics,
        wall: Callable[[], datetime],
        clock: Callable[[], float],
    ) -> "DialRoom":
        """Have the accounts of the PBXs registered. Raises StoreUnavailable."""
        accounts = settings.pbx_accounts()
        ids: dict[str, int] = {}
        if accounts:
            ids = await journal.register([AccountRow(name, *of) for name, of in accounts.items()])
            await journal.resume_coverage(ids.values(), wall())
        return cls(settings, ids, journal, dsn, metrics=metrics, wall=wall, clock=clock)

    def not_ready(self) -> list[str]:
        """Which PBXs are not heard now, and why."""
        return [f"{pbx.name}: {pbx.trouble}" for pbx in self._pbxs if pbx.trouble]

    @asynccontextmanager
    async def working(
        self, pipeline: Pipeline, ledger: Ledger, tasks: asyncio.TaskGroup
    ) -> AsyncIterator[None]:
        """Everything runs during the block, but the dial watch: that is `run` by whoever commits, and drained
        after this block."""
        async with AsyncExitStack() as stack:
            ears: list[asyncio.Task[None]] = []
            stack.push_async_callback(self._deafen, ears)
            for name, pbx in self._settings.noojee.items():
                if (hearing := self._noojee(name, pbx, pipeline, ledger)) is not None:
                    ears.append(tasks.create_task(hearing, name=f"noojee {name}"))
            webhooks: dict[str, Handler] = {}
            for name, other in self._settings.click2dial.items():
                if (reading := self._click2dial(name, other, webhooks, pipeline, ledger)) is not None:
                    ears.append(tasks.create_task(reading, name=f"click2dial {name}"))
            placing = tasks.create_task(self.switchboard.run(), name="switchboard")
            stack.callback(placing.cancel)
            stack.push_async_callback(self._sent)
            await self._serve(stack, webhooks)
            yield

    async def _serve(self, stack: AsyncExitStack, webhooks: Mapping[str, Handler]) -> None:
        api = self._settings.api
        if api.token is None and not webhooks:
            return
        history = await stack.enter_async_context(DialHistory(self._dsn))
        served = await stack.enter_async_context(
            Api(
                token=api.token.get_secret_value() if api.token is not None else None,
                places=self.switchboard,
                history=history,
                webhooks=webhooks,
                wall=self._wall,
                host=api.host,
                port=api.port,
            )
        )
        self.port = served.port
        self._log.info("dials may be asked for", port=self.port)

    async def _sent(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(SENT_S):
                await self.switchboard.drain()

    async def _deafen(self, ears: Iterable[asyncio.Task[None]]) -> None:
        at = self._wall()
        for pbx in self._pbxs:
            pbx.end(at)
        for task in ears:
            task.cancel()
        await asyncio.gather(*ears, return_exceptions=True)

    def _noojee(
        self, name: str, pbx: NoojeePbx, pipeline: Pipeline, ledger: Ledger
    ) -> Coroutine[None, None, None] | None:
        """The way out to a Noojee; what hears its events is given back, to be run."""
        api_key = pbx.api_key.get_secret_value() if pbx.api_key is not None else ""
        tls = _context(pbx)
        accounts = {extension: self._ids[account] for extension, account in pbx.extensions.items()}
        self.switchboard.noojee[name] = NoojeeWay(
            name, pbx.dials, accounts, pbx.subscribe, Noojee(pbx.base_url, api_key, tls=tls)
        )
        if not (pbx.subscribe and accounts):
            return None
        watch = self._heard(name, accounts, pipeline, ledger)
        kept = _Place(self._settings.spool_directory() / f"noojee-{name}.place")
        events = NoojeeEvents(
            name, pbx.base_url, api_key, _Ears(watch, kept), place=kept.read(), tls=tls, wall=self._wall
        )
        for extension in accounts:
            events.watch(extension)
        return events.run()

    def _click2dial(
        self,
        name: str,
        pbx: Click2DialPbx,
        webhooks: dict[str, Handler],
        pipeline: Pipeline,
        ledger: Ledger,
    ) -> Coroutine[None, None, None] | None:
        """The way out to a Click2Dial, and its webhook; what reads its lists is given back, to be run."""
        accounts = {extension: self._ids[account] for extension, account in pbx.extensions.items()}
        headers = {title: value.get_secret_value() for title, value in pbx.headers.items()}
        self.switchboard.click2dial[name] = Click2DialWay(
            name,
            pbx.dials,
            accounts,
            pbx.version == "call_ref",
            Click2Dial(pbx.base_url, headers, tls=_context(pbx)).dial,
        )
        if not accounts or (pbx.redis_url is None and pbx.webhook_token is None):
            return None
        watch = self._heard(name, accounts, pipeline, ledger, BLOCK_S + READ_MARGIN_S)
        records = _Records(watch, self._settings.limits.dial_s)
        if pbx.webhook_token is not None:
            webhooks[name] = Click2DialWebhook(
                pbx.webhook_token.get_secret_value(), records, wall=self._wall
            ).handle
        if pbx.redis_url is None:
            # Whether the PBX posts cannot be known: it counts as heard for as long as we would hear it.
            watch.covered("", "", self._wall())
            return None
        return Click2DialLists(pbx.redis_url.get_secret_value(), records, name=name, wall=self._wall).run()

    def _heard(
        self,
        name: str,
        accounts: Mapping[str, int],
        pipeline: Pipeline,
        ledger: Ledger,
        answers_s: float | None = None,
    ) -> PbxWatch:
        watch = PbxWatch(
            name,
            accounts,
            dials=self.watch,
            pipeline=pipeline,
            ledger=ledger,
            answers_s=answers_s,
            wall=self._wall,
            gap=self._metrics.gap,
            since=self._wall(),
        )
        self._pbxs.append(watch)
        return watch


def deadlines_of(limits: Limits) -> Deadlines:
    """How long dials are waited for, as the settings say."""
    return Deadlines(
        requested_s=limits.dial_requested_s,
        accepted_s=limits.dial_accepted_s,
        silent_s=limits.dial_silent_s,
        dialing_agent_s=limits.dial_agent_s,
        dialing_s=limits.dial_ringing_s,
        dial_s=limits.dial_s,
    )


def _context(pbx: NoojeePbx | Click2DialPbx) -> ssl.SSLContext | None:
    """The TLS context of a PBX; `configuration.load` has read its certificates."""
    if not pbx.base_url.startswith("https"):
        return None
    context = ssl.create_default_context(cafile=None if pbx.ca_file is None else str(pbx.ca_file))
    if not pbx.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class _Ears:
    """Where a Noojee's events go: `listener.adapters.noojee.NoojeeHearing`."""

    def __init__(self, watch: PbxWatch, kept: "_Place") -> None:
        self._watch = watch
        self._kept = kept

    async def hear(self, events: Sequence[NoojeeHeard], committed: Callable[[], None]) -> None:
        """Takes events of one extension."""
        account = self._watch.account(events[0].extension)
        news = [
            (
                noojee_sighting(each.event, each.received_at, account),
                noojee_fact(each.event),
                each.event.unique_call_id,
                True,
            )
            for each in events
            if each.event is not None
        ]
        await self._watch.take([each.heard(account) for each in events], news, committed)

    def keep(self, place: NoojeePlace) -> None:
        """Everything up to here is stored."""
        self._kept.write(place)

    def answered(self, until: datetime) -> None:
        """Everything until then was handed on."""
        self._watch.answered(until)

    def covered(self, cause: str, detail: str, at: datetime) -> None:
        """Whether the PBX is heard."""
        self._watch.covered(cause, detail, at)


class _Records:
    """Where a Click2Dial's records go: `listener.adapters.click2dial.Click2DialHearing`."""

    def __init__(self, watch: PbxWatch, window_s: float) -> None:
        self._watch = watch
        self._window_s = window_s

    async def hear(self, message: Click2DialHeard, committed: Callable[[], None]) -> None:
        """Takes a message."""
        account = self._watch.account(message.extension)
        record = message.record
        news = []
        # An inbound call is nobody's dial; one whose direction is not told may be.
        if record is not None and record.kind == "cdr" and record.direction != "inbound":
            known = account if self._watch.knows(record.extension) else None
            seen = click2dial_sighting(record, message.received_at, known, self._window_s)
            news.append((seen, click2dial_fact(record), record.call_id, False))
        await self._watch.take([message.heard(account)], news, committed)

    def covered(self, cause: str, detail: str, at: datetime) -> None:
        """Whether the lists are read."""
        self._watch.covered(cause, detail, at)


class _Place:
    """A file with the place where the hearing of a Noojee goes on after a restart. One that is lost or old
    costs nothing: what comes again is recognised, and without one the server says what is live now."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log = structlog.get_logger()

    def read(self) -> NoojeePlace | None:
        """The place, if one was kept and can be read."""
        try:
            told = json.loads(self._path.read_bytes())
            return NoojeePlace(str(told["generation"]), int(told["seq"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._log.warning(
                "where a pbx was heard up to cannot be read", path=str(self._path), error=str(error)
            )
            return None

    def write(self, place: NoojeePlace) -> None:
        """Keeps it, wholly or not at all."""
        beside = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            beside.write_text(json.dumps({"generation": place.generation, "seq": place.seq}))
            beside.replace(self._path)
        except OSError as error:
            self._log.warning(
                "where a pbx is heard up to cannot be kept", path=str(self._path), error=str(error)
            )
