"""Every metric name, once: what the daemon counts, with which closed set of labels.

It decides names, units, buckets and label values. It refuses to know who calls it and why: its methods take
plain values and the core's structs. No label ever carries an agent, a number or a call id; a value outside
its closed set counts as `other`: nothing that the other side sends can grow the number of series.
Every series exists from the start: the first failure is then an increase and not a new series, which
Prometheus' `rate` would not see.

Only this module knows prometheus_client. Two of its habits are avoided. `start_http_server` answers any path
and blocks on an idle TLS connection, so `handler` is mounted on the daemon's own server. Its `Histogram`
takes one value at a time under a lock; a batch has thousands, so `_Histogram` adds a batch at once. Those of
dials are prometheus_client's own, because they carry exemplars: the id of a call that was so slow. Exemplars
are shown to who asks for OpenMetrics.
"""

import platform
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterable, Mapping
from datetime import datetime
from itertools import accumulate, product
from typing import NamedTuple

from aiohttp.typedefs import Handler
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.aiohttp import make_aiohttp_handler
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from listener import __version__
from listener.core.calls import (
    ANOMALY_KINDS,
    GAP_CAUSES,
    Call,
    Closing,
    Direction,
    Noted,
    Outcome,
    Recorded,
    Snapshot,
    Source,
    State,
    Step,
    Unrecognised,
)
from listener.core.dialling import Advance, Leg, Origin, System
from listener.core.dialling import Outcome as DialOutcome
from listener.core.normalise import NOTIFICATION_TYPES

OTHER = "other"
"""The label of every value outside its closed set."""

SESSION_STATES = ("starting", "up", "waiting", "refused")
"""An account's session: on its way to its first subscription; subscribed and listening; lost and trying again
after a pause; refused, so that only a person can help."""

PROBE_RESULTS = ("agreed", "disagreed", "failed")
"""A list of live calls beside what was heard: the same, so different that the session was given up, or none
that proves anything."""

LAG_BUCKETS_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 1, 5, 60)
COMMIT_BUCKETS_S = (0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)
BATCH_BUCKETS = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2000)
RING_BUCKETS_S = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120)
ANSWER_BUCKETS_S = (1, 2, 5, 10, 15, 20, 25, 30, 40, 60, 90, 180)
SERVER_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)

UNMATCHED = ("dial", "report")
"""A placed dial that ended at its deadline without its call; a report of a call that fits no dial."""

# `_created` series double what is scraped and say nothing that `process_start_time_seconds` does not.
disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client left it without types


class Described(NamedTuple):
    """One metric as the README lists it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


class _Histogram(Collector):
    """A histogram that takes many values at once. Collected on the loop's thread, where it is also fed."""

    def __init__(
        self, registry: CollectorRegistry, name: str, help_: str, buckets: tuple[float, ...]
    ) -> None:
        self._name = name
        self._help = help_
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, as often as it was met."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[Metric]:
        """Give the present counts, cumulative as the exposition format has them."""
        bounds = [*(format(bound, "g") for bound in self._bounds), "+Inf"]
        family = HistogramMetricFamily(self._name, self._help)
        pairs = list(zip(bounds, map(float, accumulate(self._counts)), strict=True))
        family.add_metric([], pairs, self._sum)
        return [family]


def _children(metric: Counter, values: Iterable[str]) -> dict[str, Counter]:
    """Make the series of a closed set of label values, and of `other`."""
    return {value: metric.labels(value) for value in (*sorted(values), OTHER)}


class Metrics:
    """The daemon's metrics, in a registry of their own.

    Feed it from the event loop only: it takes no locks of its own. Every method is cheap enough to be called
    for each batch; none blocks, and none raises for a value that it does not know.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter, gauge = self._counter, self._gauge
        Info("listener_build", "Version of the listener and of Python.", registry=self._registry).info(
            {"version": __version__, "python": platform.python_version()}
        )
        types = (*NOTIFICATION_TYPES, "snapshot", "closing", "aside", "unrecognised")
        self._notifications = _children(
            counter("listener_notifications", "Messages stored, by notification type.", "type"), types
        )
        self._anomalies = _children(
            counter("listener_anomalies", "Oddities noticed on messages and calls, by kind.", "kind"),
            ANOMALY_KINDS,
        )
        self._gap_seconds = _children(
            counter(
                "listener_gap_seconds", "Seconds in which an account was not observed, by cause.", "cause"
            ),
            GAP_CAUSES,
        )
        self._began = _children(
            counter("listener_calls_began", "Calls heard of for the first time, by direction.", "direction"),
            Direction,
        )
        self._probes = _children(
            counter(
                "listener_probes", "Lists of live calls compared with what was heard, by result.", "result"
            ),
            PROBE_RESULTS,
        )
        self._ended = _children(
            counter("listener_calls_ended", "Calls that ended, by outcome.", "outcome"), Outcome
        )
        open_states = (State.DIALING, State.RINGING, State.ESTABLISHED, State.HELD, OTHER)
        calls = gauge("listener_calls", "Calls that go on now, by state.", "state")
        self._calls = {str(state): calls.labels(state) for state in open_states}
        sessions = gauge("listener_sessions", "Sessions with the contact centre, by state.", "state")
        self._sessions = {state: sessions.labels(state) for state in (*SESSION_STATES, OTHER)}

        self._unrecognised = counter("listener_unrecognised", "Messages that could not be understood.")
        self._duplicates = counter(
            "listener_duplicates", "Messages that came again and were not counted twice."
        )
        self._handshakes = counter("listener_handshakes", "Bayeux handshakes that were answered.")
        self._reconnects = counter("listener_reconnects", "Sessions taken up again after they were lost.")
        self._commit_failures = counter("listener_commit_failures", "Transactions that did not commit.")
        self._backlog = gauge("listener_backlog_notifications", "Messages heard and not yet committed.")
        self._backlog_bytes = gauge(
            "listener_backlog_bytes", "Bytes of the messages heard and not yet committed."
        )
        self._spool_notifications = gauge(
            "listener_spool_notifications", "Messages in the spool on disk, not yet committed."
        )
        self._spool_bytes = gauge("listener_spool_bytes", "Bytes of the spool on disk.")
        self._spool_oldest = gauge(
            "listener_spool_oldest_timestamp_seconds",
            "About when the oldest message in the spool was received; 0 where there is none.",
        )
        self._spool_full = gauge("listener_spool_full", "1 while the spool takes no more, else 0.")
        self._spool_drained = counter("listener_spool_drained", "Messages committed from the spool.")
        self._spool_set_aside = counter(
            "listener_spool_set_aside", "Records of the spool that were damaged, and set aside."
        )
        self._accounts = gauge("listener_accounts", "Accounts configured.")
        self._last_commit = gauge(
            "listener_last_commit_timestamp_seconds", "When a batch was last committed."
        )
        self._last_heard = gauge(
            "listener_last_notification_timestamp_seconds", "When the newest committed message was received."
        )

        def histogram(name: str, help_: str, buckets: tuple[float, ...]) -> _Histogram:
            return _Histogram(self._registry, name, help_, buckets)

        self._lag = histogram(
            "listener_lag_seconds",
            "From a message's receipt to the commit of the transaction that holds it, on our clock.",
            LAG_BUCKETS_S,
        )
        self._server_lag = histogram(
            "listener_server_lag_seconds",
            "From the server's timestamp of a message to its receipt, across both clocks; less than 0 is 0.",
            SERVER_BUCKETS_S,
        )
        self._batch = histogram("listener_batch_notifications", "Messages in one transaction.", BATCH_BUCKETS)
        self._commit = histogram(
            "listener_commit_seconds", "From the beginning of a transaction to its commit.", COMMIT_BUCKETS_S
        )
        self._dials()
        ProcessCollector(registry=self._registry)

    def _dials(self) -> None:
        counter = self._counter
        ended = counter("listener_dials", "Dials that ended.", "system", "origin", "outcome", "leg")
        self._dials_ended = {
            labels: ended.labels(*labels) for labels in product(System, Origin, DialOutcome, Leg)
        }
        connected = counter(
            "listener_dials_connected",
            "Dials that were answered, counted at the answer: failures are a share of these and themselves.",
            "system",
            "origin",
        )
        rings = self._histogram(
            "listener_dial_ring_seconds", "From the request of a dial to its ringing.", RING_BUCKETS_S
        )
        answers = self._histogram(
            "listener_dial_answer_seconds", "From the request of a dial to its answer.", ANSWER_BUCKETS_S
        )
        pairs = list(product(System, Origin))
        self._dials_connected = {pair: connected.labels(*pair) for pair in pairs}
        self._dial_rings = {pair: rings.labels(*pair) for pair in pairs}
        self._dial_answers = {pair: answers.labels(*pair) for pair in pairs}
        waiting = self._gauge("listener_dials_waiting", "Dials that wait for their end.", "system")
        self._dials_waiting = {system: waiting.labels(system) for system in System}
        self._dials_unmatched = _children(
            counter(
                "listener_dials_unmatched",
                "Placed dials that ended without their call, and reports of calls that fit no dial.",
                "what",
            ),
            UNMATCHED,
        )
        self._dials_ambiguous = counter(
            "listener_dials_ambiguous", "Calls, and reports of calls, that may be of several dials."
        )
        self._dials_dropped = counter(
            "listener_dials_dropped", "Facts of dials that were dropped: too many waited for the store."
        )
        self._dials_corrected = counter(
            "listener_dials_corrected", "Dials whose unknown outcome a late end corrected."
        )

    def _counter(self, name: str, help_: str, *labels: str) -> Counter:
        return Counter(name, help_, labels, registry=self._registry)

    def _histogram(self, name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_, ("system", "origin"), buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, help_: str, *labels: str) -> Gauge:
        return Gauge(name, help_, labels, registry=self._registry)

    # ── what happened ─────────────────────────────────────────────────────────────────────────────────

    def recorded(self, recorded: Recorded, seconds: float, now: datetime) -> None:
        """Count one committed transaction: what it did, how long it took, and that it committed at `now`."""
        entries = recorded.entries
        self._commit.observe(seconds)
        self._batch.observe(len(entries) + recorded.duplicates)
        self._duplicates.inc(recorded.duplicates)
        self._last_commit.set(now.timestamp())
        # What we found ourselves was not heard, and must not look like a sign of life.
        heard = [entry.heard.received_at for entry in entries if entry.heard.source is not Source.LISTENER]
        if heard:
            self._last_heard.set(max(heard).timestamp())
        for received_at, times in Tally(entry.heard.received_at for entry in entries).items():
            self._lag.observe(max(0.0, (now - received_at).total_seconds()), times)
        odd: Tally[str] = Tally()
        for entry in entries:
            if isinstance(entry.other, Snapshot):
                odd.update(anomaly.kind for anomaly in entry.other.oddities)
            elif entry.server_at is not None:
                server_lag = entry.heard.received_at - entry.server_at
                self._server_lag.observe(max(0.0, server_lag.total_seconds()))
        for kind, times in Tally(_type(entry) for entry in entries).items():
            self._notifications.get(kind, self._notifications[OTHER]).inc(times)
            if kind == "unrecognised":
                self._unrecognised.inc(times)
        for step in recorded.steps:
            odd.update(anomaly.kind for anomaly in step.anomalies)
            self._step(step)
        for kind, times in odd.items():
            self._anomalies.get(kind, self._anomalies[OTHER]).inc(times)

    def _step(self, step: Step) -> None:
        call = step.call
        if step.began:
            self._began[call.direction].inc()
        if step.ended:
            self._ended[call.outcome or Outcome.UNKNOWN].inc()
        if call.open:
            self._open_calls_of(call.state).inc()
        # A call that had ended before this message left the gauge then.
        if not step.began and (call.open or step.ended):
            before = next((change.before for change in step.changes if change.field == "state"), call.state)
            self._open_calls_of(before or "").dec()

    def _open_calls_of(self, state: str) -> Gauge:
        return self._calls.get(state, self._calls[OTHER])

    def commit_failed(self) -> None:
        """Count a transaction that did not commit; what it held is tried again."""
        self._commit_failures.inc()

    def duplicates(self, count: int) -> None:
        """Count messages that the server repeated and the session recognised, before any transaction."""
        self._duplicates.inc(count)

    def handshake(self) -> None:
        """Count an answered handshake."""
        self._handshakes.inc()

    def reconnect(self) -> None:
        """Count a session that was lost and is up again."""
        self._reconnects.inc()

    def gap(self, cause: str, seconds: float) -> None:
        """Add `seconds` in which one account was not observed because of `cause` (one of GAP_CAUSES)."""
        self._gap_seconds.get(cause, self._gap_seconds[OTHER]).inc(seconds)

    def probe(self, result: str) -> None:
        """Count a probe (one of PROBE_RESULTS)."""
        self._probes.get(result, self._probes[OTHER]).inc()

    def dial(self, advance: Advance) -> None:
        """Count what a stored fact did to a dial."""
        dial = advance.dial
        pair = (dial.system, dial.origin)
        # Of all that is known of a dial, a call id alone is nobody's personal value.
        exemplar = {"call": str(dial.call)} if dial.call is not None else None
        if advance.ringing and dial.time_to_ring_s is not None:
            self._dial_rings[pair].observe(dial.time_to_ring_s, exemplar)
        if advance.connected:
            self._dials_connected[pair].inc()
            if dial.time_to_answer_s is not None:
                self._dial_answers[pair].observe(dial.time_to_answer_s, exemplar)
        if advance.ended and dial.outcome is not None:
            self._dials_ended[(*pair, dial.outcome, dial.leg or Leg.SYSTEM)].inc()
        if advance.corrected:
            self._dials_corrected.inc()

    def dial_ambiguous(self) -> None:
        """Count a call, or a report of one, that may be several dials'."""
        self._dials_ambiguous.inc()

    def dial_dropped(self, facts: int) -> None:
        """Count facts that no dial will be told."""
        self._dials_dropped.inc(facts)

    def dial_unmatched(self, what: str) -> None:
        """Count a dial without a call, or a report without a dial (one of UNMATCHED)."""
        self._dials_unmatched.get(what, self._dials_unmatched[OTHER]).inc()

    # ── what is now ───────────────────────────────────────────────────────────────────────────────────

    def session_state(self, before: str | None, after: str | None) -> None:
        """Move one session from a state to another (one of SESSION_STATES); None is outside of being."""
        if before is not None:
            self._sessions.get(before, self._sessions[OTHER]).dec()
        if after is not None:
            self._sessions.get(after, self._sessions[OTHER]).inc()

    def open_calls(self, calls: Iterable[Call]) -> None:
        """Set the calls that go on now, as the store knew them at start; `recorded` moves them on."""
        for gauge in self._calls.values():
            gauge.set(0)
        for call in calls:
            self._open_calls_of(call.state).inc()

    def dials_waiting(self, waiting: Mapping[System, int]) -> None:
        """Say how many dials wait for their end, of each system."""
        for system, gauge in self._dials_waiting.items():
            gauge.set(waiting.get(system, 0))

    def backlog(self, notifications: int, size_bytes: int) -> None:
        """Say how much was heard and is not yet committed."""
        self._backlog.set(notifications)
        self._backlog_bytes.set(size_bytes)

    def spool(
        self,
        *,
        notifications: int,
        size_bytes: int,
        oldest: datetime | None,
        drained: int,
        set_aside: int,
        full: bool,
    ) -> None:
        """Say what is in the spool, and add what was drained and set aside since it was last said."""
        self._spool_notifications.set(notifications)
        self._spool_bytes.set(size_bytes)
        self._spool_oldest.set(oldest.timestamp() if oldest is not None else 0)
        self._spool_full.set(full)
        self._spool_drained.inc(drained)
        self._spool_set_aside.inc(set_aside)

    def spool_damaged(self, count: int) -> None:
        """Count what was found damaged in the spool at the start."""
        self._spool_set_aside.inc(count)

    def accounts(self, count: int) -> None:
        """Say how many accounts are configured."""
        self._accounts.set(count)

    # ── who reads it ──────────────────────────────────────────────────────────────────────────────────

    def handler(self) -> Handler:
        """Give the aiohttp handler of /metrics; it speaks Prometheus' text format and OpenMetrics."""
        return make_aiohttp_handler(self._registry)

    def text(self) -> str:
        """Give all of it in Prometheus' text format."""
        return generate_latest(self._registry).decode()

    def catalogue(self) -> list[Described]:
        """List our metrics by name, as the README shows them; the process' own are left out."""
        found = []
        for family in self._registry.collect():
            if not family.name.startswith("listener_"):
                continue
            suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
            labels = {name for sample in family.samples for name in sample.labels} - {"le"}
            found.append(
                Described(family.name + suffix, family.type, tuple(sorted(labels)), family.documentation)
            )
        return sorted(found)


def _type(message: Noted) -> str:
    match message.other:
        case None:
            return message.notification_type
        case Snapshot():
            return "snapshot"
        case Closing():
            return "closing"
        case Unrecognised():
            return "unrecognised"
        case _:
            return "aside"
