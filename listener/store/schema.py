"""The tables, as SQLAlchemy knows them: what Alembic compares a database with, and what `history` reads.

What the migrations alone hold, because SQLAlchemy has no words for it, is the partitions of
`notification`, the sequence function, the roles with their grants, and the `report_*` views.

Three choices run through all of it. Text that came from outside has no length limit and no check: what was
observed is stored. The hot tables (`notification`, `change`, `participant`, `anomaly`) have no foreign keys:
a key costs a look-up per row, and the journal writes them in the transaction that wrote what they point
to. An index stands only where a question needs it, and says which.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    Label,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Sequence,
    Table,
    Text,
    Uuid,
    func,
    literal_column,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSON, ExcludeConstraint

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

NOTIFICATION_ID = Sequence("notification_id_seq", metadata=metadata, data_type=BigInteger)
"""Taken only through `listener_reserve_ids`, which gives a batch consecutive ids."""


def _moment(name: str, *, nullable: bool = False) -> Column[Any]:
    return Column(name, DateTime(timezone=True), nullable=nullable)


def _words(name: str, *, nullable: bool = False) -> Column[Any]:
    return Column(name, Text, nullable=nullable)


def _backwards(column: str) -> Label[str]:
    """A number from its last digit on: its ending is then the beginning, which an index finds."""
    return literal_column(f"reverse({column})", Text).label("backwards")


_BY_PREFIX = {"backwards": "text_pattern_ops"}

account = Table(
    "account",
    metadata,
    Column("id", Integer, Identity(always=True), primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("tenant", Text, nullable=False, server_default=""),
    _words("environment"),
    Column("added_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    _moment("removed_at", nullable=True),
    _moment("heard_at", nullable=True),
    # Every batch writes the rows of its accounts.
    postgresql_with={"fillfactor": 50},
    comment="A login whose calls are heard. Its row is the lock of everything that is written about it.",
)

stream = Table(
    "stream",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("account_id", Integer, ForeignKey("account.id"), nullable=False),
    _words("source"),
    _moment("opened_at"),
    Column("position", BigInteger, nullable=False),
    # What to acknowledge when the session is resumed, and the position up to which that reaches. Never older
    # than what was acknowledged, since it is written with the messages that it covers.
    Column("batch", BigInteger),
    Column("batch_position", BigInteger),
    # `position` moves with every batch: room for the new version beside the old one.
    postgresql_with={"fillfactor": 50},
    comment="One Bayeux session or snapshot. What has a position up to `position` is committed.",
)

notification = Table(
    "notification",
    metadata,
    _moment("received_at"),
    Column("id", BigInteger, nullable=False),
    Column("account_id", Integer, nullable=False),
    Column("stream_id", Uuid, nullable=False),
    Column("position", BigInteger, nullable=False),
    _words("source"),
    _words("channel"),
    _words("message_type"),
    _words("notification_type"),
    Column("call_id", BigInteger),
    _moment("asked_at", nullable=True),
    _moment("server_at", nullable=True),
    _words("reason", nullable=True),
    Column("raw", LargeBinary, nullable=False),
    PrimaryKeyConstraint("received_at", "id"),
    # Everything that was said about one call, also what changed nothing (DtmfSent).
    Index("ix_notification_call_id", "call_id", postgresql_where=text("call_id IS NOT NULL")),
    postgresql_partition_by="RANGE (received_at)",
    comment="The journal: every message with its exact bytes. Rows are added and never changed.",
)

call = Table(
    "call",
    metadata,
    # What never changes comes first and what is long comes last: the WAL of an update leaves out the
    # beginning and the end that both versions share.
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("account_id", Integer, ForeignKey("account.id"), nullable=False),
    _words("call_id"),
    _moment("opened_at"),
    _words("direction"),
    _words("opened_by"),
    _words("call_uuid", nullable=True),
    _words("conn_id", nullable=True),
    _words("parent_call_id", nullable=True),
    _words("call_type", nullable=True),
    _words("phone_number", nullable=True),
    _words("device_id", nullable=True),
    _words("ani", nullable=True),
    _words("dnis", nullable=True),
    _words("number", nullable=True),
    _words("mute", nullable=True),
    _words("recording", nullable=True),
    Column("supervisor_listening_in", Boolean),
    Column("monitored_user_muted", Boolean),
    Column("monitoring", Boolean),
    _words("supervisor_monitoring_state", nullable=True),
    _words("state"),
    _moment("state_since"),
    _moment("last_heard_at"),
    _moment("established_at", nullable=True),
    _moment("ended_at", nullable=True),
    Column("ring_s", Double, nullable=False),
    Column("talk_s", Double, nullable=False),
    Column("hold_s", Double, nullable=False),
    Column("hold_count", Integer, nullable=False),
    Column("wrap_s", Double),
    Column("wrap_up_time_s", Double),
    Column("server_duration_s", Double),
    _moment("server_at", nullable=True),
    Column("notifications", Integer, nullable=False),
    Column("anomalies", Integer, nullable=False),
    _words("outcome", nullable=True),
    _words("settled", nullable=True),
    Column("capabilities", ARRAY(Text), nullable=False),
    Column("aliases", ARRAY(Text), nullable=False),
    # json and not jsonb: it gives back exactly what was put in (order of keys, spelling of numbers), so that
    # a call read back compares equal to the one written; and it costs no tree.
    Column("participants", JSON, nullable=False),
    Column("user_data", JSON, nullable=False),
    # The newest calls, of all accounts and of one.
    Index("ix_call_opened_at_id", "opened_at", "id"),
    Index("ix_call_account_id_opened_at_id", "account_id", "opened_at", "id"),
    # The live calls: at a start, for a snapshot, on the board. Small, whatever the history.
    Index("ix_call_open", "account_id", postgresql_where=text("ended_at IS NULL AND settled IS NULL")),
    # Those that ended and wait for the end of their wrap-up. As small.
    Index(
        "ix_call_unsettled",
        "ended_at",
        postgresql_where=text("ended_at IS NOT NULL AND settled IS NULL"),
    ),
    # The legs of one interaction.
    Index("ix_call_call_uuid", "call_uuid"),
    # A number, whole or by its last digits: the other party, our own, and the one that was dialled.
    Index("ix_call_number", _backwards("number"), "opened_at", postgresql_ops=_BY_PREFIX),
    Index("ix_call_phone_number", _backwards("phone_number"), "opened_at", postgresql_ops=_BY_PREFIX),
    Index("ix_call_dnis", _backwards("dnis"), "opened_at", postgresql_ops=_BY_PREFIX),
    # A call is written about ten times. With room on its page the new version needs no new index entries.
    postgresql_with={"fillfactor": 60},
    comment="One account's leg of one call, as of the last message about it.",
)

CALL_COLUMN_OF = {"account": "account_id", "parties": "participants"}
"""The columns of `call` that are named otherwise than the fields of `listener.core.calls.Call`."""

call_alias = Table(
    "call_alias",
    metadata,
    _words("alias"),
    Column("account_id", Integer, nullable=False),
    Column("call_id", BigInteger, nullable=False),
    # The id first, since people ask for it without the account.
    PrimaryKeyConstraint("alias", "account_id"),
    comment="Which call an id names now; an id that is used again names the newer call.",
)

participant = Table(
    "participant",
    metadata,
    Column("call_id", BigInteger, nullable=False),
    Column("ordinal", Integer, nullable=False),
    _words("number"),
    _words("e164"),
    _words("formatted"),
    _words("role"),
    _moment("joined_at"),
    _moment("left_at", nullable=True),
    PrimaryKeyConstraint("call_id", "ordinal"),
    # Calls on which a number took part, also as the third party.
    Index("ix_participant_number", _backwards("number"), "joined_at", postgresql_ops=_BY_PREFIX),
    # The same by its international spelling, where that is another one.
    Index(
        "ix_participant_e164",
        _backwards("e164"),
        "joined_at",
        postgresql_ops=_BY_PREFIX,
        postgresql_where=text("e164 <> '' AND e164 <> number"),
    ),
    comment="A participant's stay on a call.",
)

change = Table(
    "change",
    metadata,
    Column("call_id", BigInteger, nullable=False),
    Column("notification_id", BigInteger, nullable=False),
    Column("ordinal", Integer, nullable=False),
    _moment("at"),
    _words("field"),
    _words("key"),
    Column("before", JSON(none_as_null=True)),
    Column("after", JSON(none_as_null=True)),
    PrimaryKeyConstraint("call_id", "notification_id", "ordinal"),
    # What changed in a stretch of time, for dashboards; rows come in the order of time.
    Index("ix_change_at", "at", postgresql_using="brin"),
    comment="One field of one call went from before to after. NULL is absence.",
)

anomaly = Table(
    "anomaly",
    metadata,
    Column("notification_id", BigInteger, nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("call_id", BigInteger),
    _moment("at"),
    _words("kind"),
    _words("detail"),
    PrimaryKeyConstraint("notification_id", "ordinal"),
    # The oddities of one call.
    Index("ix_anomaly_call_id", "call_id", postgresql_where=text("call_id IS NOT NULL")),
    comment="Something odd about a message or a call, recorded and never refused.",
)

_COVERED = (
    (text("int4range(account_id, account_id, '[]')"), "&&"),
    (text("tstzrange(since, until)"), "&&"),
)

coverage = Table(
    "coverage",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("account_id", Integer, ForeignKey("account.id"), nullable=False),
    _moment("since"),
    _moment("until", nullable=True),
    _words("cause"),
    _moment("seen_at", nullable=True),
    CheckConstraint("until >= since", name="forwards"),
    # Two answers for one moment would be none. Ranges of integers need no extension, as `=` in GiST would.
    ExcludeConstraint(*_COVERED, name="ex_coverage_no_overlap", using="gist"),
    # The last row of an account, and its rows in a stretch of time.
    Index("ix_coverage_account_id_since", "account_id", "since"),
    # What is true now: one row an account.
    Index("uq_coverage_open", "account_id", unique=True, postgresql_where=text("until IS NULL")),
    # The heartbeat rewrites every open row.
    postgresql_with={"fillfactor": 50},
    comment="Whether an account was observed (cause empty), or why not; `until` NULL is now.",
)

bayeux_session = Table(
    "bayeux_session",
    metadata,
    Column("account_id", Integer, ForeignKey("account.id"), primary_key=True, autoincrement=False),
    Column("stream_id", Uuid, nullable=False),
    _words("client_id"),
    Column("acknowledges", Boolean, nullable=False),
    _words("connection_type"),
    Column("max_interval_s", Double),
    Column("channels", ARRAY(Text), nullable=False),
    _words("owner"),
    Column("credentials", JSON, nullable=False),
    _moment("saved_at"),
    comment="What a restart goes on with. A credential: only the writer reads it; gone when its session is.",
)

dial = Table(
    "dial",
    metadata,
    _words("id"),
    Column("account_id", Integer, ForeignKey("account.id"), nullable=False),
    _words("system"),
    _words("origin"),
    _words("number"),
    _words("number_normalised"),
    _moment("requested_at"),
    _words("state"),
    _words("reached"),
    _words("device", nullable=True),
    _words("reference", nullable=True),
    _words("caller_id", nullable=True),
    _words("campaign", nullable=True),
    _words("session", nullable=True),
    _moment("accepted_at", nullable=True),
    _moment("ringing_at", nullable=True),
    _moment("connected_at", nullable=True),
    _moment("hangup_at", nullable=True),
    _moment("ended_at", nullable=True),
    _moment("deadline_at", nullable=True),
    _words("outcome", nullable=True),
    _words("leg", nullable=True),
    _words("ended_by", nullable=True),
    _words("cause_system", nullable=True),
    _words("cause_field", nullable=True),
    _words("cause_code", nullable=True),
    _words("cause_text", nullable=True),
    _words("cause_leg", nullable=True),
    _words("confidence", nullable=True),
    Column("expired", Boolean, nullable=False),
    Column("corrected", Boolean, nullable=False),
    Column("call_id", BigInteger),
    Column("matched_by", ARRAY(Text), nullable=False),
    _words("match_confidence", nullable=True),
    # What the core does not know: which dials the call may also be; how often a fact changed it; the newest
    # message that did; the dial that it turned out to be; and what was asked for, by whom.
    Column("candidates", ARRAY(Text), nullable=False),
    Column("facts", Integer, nullable=False),
    Column("heard_id", BigInteger, nullable=False),
    _words("merged_into", nullable=True),
    _words("idempotency_key", nullable=True),
    Column("request", JSON(none_as_null=True)),
    PrimaryKeyConstraint("id"),
    # The same key never dials twice, whatever account the settings of the day give its request.
    Index(
        "uq_dial_idempotency_key",
        "idempotency_key",
        unique=True,
        postgresql_where=text("idempotency_key IS NOT NULL"),
    ),
    # The newest dials, of all accounts and of one; and those that ended in one way.
    Index("ix_dial_requested_at_id", "requested_at", "id"),
    Index("ix_dial_account_id_requested_at_id", "account_id", "requested_at", "id"),
    Index("ix_dial_outcome_requested_at_id", "outcome", "requested_at", "id"),
    Index("ix_dial_number", _backwards("number_normalised"), "requested_at", postgresql_ops=_BY_PREFIX),
    # The dial of a call.
    Index("ix_dial_call_id", "call_id", postgresql_where=text("call_id IS NOT NULL")),
    # Those that wait for their end, the next deadline first. Small, whatever the history.
    Index(
        "ix_dial_waiting",
        "deadline_at",
        postgresql_where=text("outcome IS NULL AND merged_into IS NULL"),
    ),
    # The placed ones that wait for their call, of the accounts at which one was heard.
    Index(
        "ix_dial_unclaimed",
        "account_id",
        postgresql_where=text("outcome IS NULL AND origin = 'placed' AND call_id IS NULL"),
    ),
    # A dial is written about five times.
    postgresql_with={"fillfactor": 70},
    comment="An attempt to reach a number, as of the last fact. A placed one is written before it is sent.",
)

dial_fact = Table(
    "dial_fact",
    metadata,
    _words("dial_id"),
    Column("ordinal", Integer, nullable=False),
    _moment("at"),
    _words("kind"),
    Column("notification_id", BigInteger),
    _words("said"),
    _words("leg", nullable=True),
    _words("cause_system", nullable=True),
    _words("cause_field", nullable=True),
    _words("cause_code", nullable=True),
    _words("cause_text", nullable=True),
    _words("state"),
    _words("outcome", nullable=True),
    PrimaryKeyConstraint("dial_id", "ordinal"),
    comment="What was heard of a dial, in order, and what it was then. Rows are added and never changed.",
)

dial_mark = Table(
    "dial_mark",
    metadata,
    Column("account_id", Integer, primary_key=True, autoincrement=False),
    Column("notification_id", BigInteger, nullable=False),
    _moment("received_at"),
    postgresql_with={"fillfactor": 50},
    comment="Up to which message of an account the dials follow from its calls.",
)


def include_name(name: str | None, kind: str, parents: object) -> bool:
    """Which names of a database Alembic compares with these tables: not the partitions, which come and go."""
    del parents
    return kind != "table" or name in metadata.tables
