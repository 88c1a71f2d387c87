"""The journal, the calls that follow from it, coverage, the roles and the views.

Revision ID: 0001
Revises:

Statements are plain SQL, since half of what is here (partitions, functions, grants, views) has no other form.
"""

from alembic import op
from sqlalchemy import text

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    """
    CREATE TABLE account (
        id integer GENERATED ALWAYS AS IDENTITY CONSTRAINT pk_account PRIMARY KEY,
        name text NOT NULL CONSTRAINT uq_account_name UNIQUE,
        tenant text NOT NULL DEFAULT '',
        environment text NOT NULL,
        added_at timestamptz NOT NULL DEFAULT now(),
        removed_at timestamptz,
        heard_at timestamptz
    ) WITH (fillfactor = 50)""",
    """
    CREATE TABLE stream (
        id uuid CONSTRAINT pk_stream PRIMARY KEY,
        account_id integer NOT NULL CONSTRAINT fk_stream_account_id_account REFERENCES account,
        source text NOT NULL,
        opened_at timestamptz NOT NULL,
        position bigint NOT NULL,
        batch bigint,
        batch_position bigint
    ) WITH (fillfactor = 50)""",
    "CREATE SEQUENCE notification_id_seq AS bigint",
    """
    CREATE TABLE notification (
        received_at timestamptz NOT NULL,
        id bigint NOT NULL,
        account_id integer NOT NULL,
        stream_id uuid NOT NULL,
        position bigint NOT NULL,
        source text NOT NULL,
        channel text NOT NULL,
        message_type text NOT NULL,
        notification_type text NOT NULL,
        call_id bigint,
        asked_at timestamptz,
        server_at timestamptz,
        reason text,
        raw bytea NOT NULL,
        CONSTRAINT pk_notification PRIMARY KEY (received_at, id)
    ) PARTITION BY RANGE (received_at)""",
    "CREATE INDEX ix_notification_call_id ON notification (call_id) WHERE call_id IS NOT NULL",
    # What no month was made for in time. A message of 2 to 8 kB stays in its row, uncompressed: compressing
    # took longer than all else that is done for it (reference: PostgreSQL, TOAST).
    "CREATE TABLE notification_default PARTITION OF notification DEFAULT WITH (toast_tuple_target = 8128)",
    """
    CREATE TABLE call (
        id bigint CONSTRAINT pk_call PRIMARY KEY,
        account_id integer NOT NULL CONSTRAINT fk_call_account_id_account REFERENCES account,
        call_id text NOT NULL,
        opened_at timestamptz NOT NULL,
        direction text NOT NULL,
        opened_by text NOT NULL,
        call_uuid text,
        conn_id text,
        parent_call_id text,
        call_type text,
        phone_number text,
        device_id text,
        ani text,
        dnis text,
        number text,
        mute text,
        recording text,
        supervisor_listening_in boolean,
        monitored_user_muted boolean,
        monitoring boolean,
        supervisor_monitoring_state text,
        state text NOT NULL,
        state_since timestamptz NOT NULL,
        last_heard_at timestamptz NOT NULL,
        established_at timestamptz,
        ended_at timestamptz,
        ring_s double precision NOT NULL,
        talk_s double precision NOT NULL,
        hold_s double precision NOT NULL,
        hold_count integer NOT NULL,
        wrap_s double precision,
        wrap_up_time_s double precision,
        server_duration_s double precision,
        server_at timestamptz,
        notifications integer NOT NULL,
        anomalies integer NOT NULL,
        outcome text,
        settled text,
        capabilities text[] NOT NULL,
        aliases text[] NOT NULL,
        participants json NOT NULL,
        user_data json NOT NULL
    ) WITH (fillfactor = 60)""",
    "CREATE INDEX ix_call_opened_at_id ON call (opened_at, id)",
    "CREATE INDEX ix_call_account_id_opened_at_id ON call (account_id, opened_at, id)",
    "CREATE INDEX ix_call_open ON call (account_id) WHERE ended_at IS NULL AND settled IS NULL",
    "CREATE INDEX ix_call_unsettled ON call (ended_at) WHERE ended_at IS NOT NULL AND settled IS NULL",
    "CREATE INDEX ix_call_call_uuid ON call (call_uuid)",
    "CREATE INDEX ix_call_number ON call (reverse(number) text_pattern_ops, opened_at)",
    "CREATE INDEX ix_call_phone_number ON call (reverse(phone_number) text_pattern_ops, opened_at)",
    "CREATE INDEX ix_call_dnis ON call (reverse(dnis) text_pattern_ops, opened_at)",
    # A call as the journal hands it in: an array of these is cheaper than an array for each column. A column
    # that comes later gets a type of its own, so that recorders of both versions can run.
    """
    CREATE TYPE call_written AS (
        id bigint,
        account_id integer,
        call_id text,
        direction text,
        opened_by text,
        opened_at timestamptz,
        call_uuid text,
        conn_id text,
        parent_call_id text,
        call_type text,
        phone_number text,
        device_id text,
        ani text,
        dnis text,
        number text,
        mute text,
        recording text,
        supervisor_listening_in boolean,
        monitored_user_muted boolean,
        monitoring boolean,
        supervisor_monitoring_state text,
        state text,
        ring_s double precision,
        talk_s double precision,
        hold_s double precision,
        hold_count integer,
        wrap_s double precision,
        wrap_up_time_s double precision,
        server_duration_s double precision,
        notifications integer,
        anomalies integer,
        outcome text,
        settled text,
        state_since timestamptz,
        last_heard_at timestamptz,
        established_at timestamptz,
        ended_at timestamptz,
        server_at timestamptz,
        capabilities text,
        aliases text,
        participants json,
        user_data json
    )""",
    """
    CREATE TABLE call_alias (
        alias text NOT NULL,
        account_id integer NOT NULL,
        call_id bigint NOT NULL,
        CONSTRAINT pk_call_alias PRIMARY KEY (alias, account_id)
    )""",
    """
    CREATE TABLE participant (
        call_id bigint NOT NULL,
        ordinal integer NOT NULL,
        number text NOT NULL,
        e164 text NOT NULL,
        formatted text NOT NULL,
        role text NOT NULL,
        joined_at timestamptz NOT NULL,
        left_at timestamptz,
        CONSTRAINT pk_participant PRIMARY KEY (call_id, ordinal)
    )""",
    "CREATE INDEX ix_participant_number ON participant (reverse(number) text_pattern_ops, joined_at)",
    """
    CREATE INDEX ix_participant_e164 ON participant (reverse(e164) text_pattern_ops, joined_at)
        WHERE e164 <> '' AND e164 <> number""",
    """
    CREATE TABLE change (
        call_id bigint NOT NULL,
        notification_id bigint NOT NULL,
        ordinal integer NOT NULL,
        at timestamptz NOT NULL,
        field text NOT NULL,
        key text NOT NULL,
        before json,
        after json,
        CONSTRAINT pk_change PRIMARY KEY (call_id, notification_id, ordinal)
    )""",
    "CREATE INDEX ix_change_at ON change USING brin (at)",
    """
    CREATE TABLE anomaly (
        notification_id bigint NOT NULL,
        ordinal integer NOT NULL,
        call_id bigint,
        at timestamptz NOT NULL,
        kind text NOT NULL,
        detail text NOT NULL,
        CONSTRAINT pk_anomaly PRIMARY KEY (notification_id, ordinal)
    )""",
    "CREATE INDEX ix_anomaly_call_id ON anomaly (call_id) WHERE call_id IS NOT NULL",
    """
    CREATE TABLE coverage (
        id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT pk_coverage PRIMARY KEY,
        account_id integer NOT NULL CONSTRAINT fk_coverage_account_id_account REFERENCES account,
        since timestamptz NOT NULL,
        until timestamptz,
        cause text NOT NULL,
        seen_at timestamptz,
        CONSTRAINT ck_coverage_forwards CHECK (until >= since),
        CONSTRAINT ex_coverage_no_overlap
            EXCLUDE USING gist (
                int4range(account_id, account_id, '[]') WITH &&, tstzrange(since, until) WITH &&
            )
    ) WITH (fillfactor = 50)""",
    "CREATE INDEX ix_coverage_account_id_since ON coverage (account_id, since)",
    "CREATE UNIQUE INDEX uq_coverage_open ON coverage (account_id) WHERE until IS NULL",
    """
    CREATE TABLE bayeux_session (
        account_id integer CONSTRAINT pk_bayeux_session PRIMARY KEY
            CONSTRAINT fk_bayeux_session_account_id_account REFERENCES account,
        stream_id uuid NOT NULL,
        client_id text NOT NULL,
        acknowledges boolean NOT NULL,
        connection_type text NOT NULL,
        max_interval_s double precision,
        channels text[] NOT NULL,
        owner text NOT NULL,
        credentials json NOT NULL,
        saved_at timestamptz NOT NULL
    )""",
    """
    CREATE TABLE dial (
        id text CONSTRAINT pk_dial PRIMARY KEY,
        account_id integer NOT NULL CONSTRAINT fk_dial_account_id_account REFERENCES account,
        system text NOT NULL,
        origin text NOT NULL,
        number text NOT NULL,
        number_normalised text NOT NULL,
        requested_at timestamptz NOT NULL,
        state text NOT NULL,
        reached text NOT NULL,
        device text,
        reference text,
        caller_id text,
        campaign text,
        session text,
        accepted_at timestamptz,
        ringing_at timestamptz,
        connected_at timestamptz,
        hangup_at timestamptz,
        ended_at timestamptz,
        deadline_at timestamptz,
        outcome text,
        leg text,
        ended_by text,
        cause_system text,
        cause_field text,
        cause_code text,
        cause_text text,
        cause_leg text,
        confidence text,
        expired boolean NOT NULL,
        corrected boolean NOT NULL,
        call_id bigint,
        matched_by text[] NOT NULL,
        match_confidence text,
        candidates text[] NOT NULL,
        facts integer NOT NULL,
        heard_id bigint NOT NULL,
        merged_into text,
        idempotency_key text,
        request json
    ) WITH (fillfactor = 70)""",
    """
    CREATE UNIQUE INDEX uq_dial_idempotency_key ON dial (idempotency_key)
        WHERE idempotency_key IS NOT NULL""",
    "CREATE INDEX ix_dial_requested_at_id ON dial (requested_at, id)",
    "CREATE INDEX ix_dial_account_id_requested_at_id ON dial (account_id, requested_at, id)",
    "CREATE INDEX ix_dial_outcome_requested_at_id ON dial (outcome, requested_at, id)",
    "CREATE INDEX ix_dial_number ON dial (reverse(number_normalised) text_pattern_ops, requested_at)",
    "CREATE INDEX ix_dial_call_id ON dial (call_id) WHERE call_id IS NOT NULL",
    "CREATE INDEX ix_dial_waiting ON dial (deadline_at) WHERE outcome IS NULL AND merged_into IS NULL",
    """
    CREATE INDEX ix_dial_unclaimed ON dial (account_id)
        WHERE outcome IS NULL AND origin = 'placed' AND call_id IS NULL""",
    """
    CREATE TABLE dial_fact (
        dial_id text NOT NULL,
        ordinal integer NOT NULL,
        at timestamptz NOT NULL,
        kind text NOT NULL,
        notification_id bigint,
        said text NOT NULL,
        leg text,
        cause_system text,
        cause_field text,
        cause_code text,
        cause_text text,
        state text NOT NULL,
        outcome text,
        CONSTRAINT pk_dial_fact PRIMARY KEY (dial_id, ordinal)
    )""",
    """
    CREATE TABLE dial_mark (
        account_id integer CONSTRAINT pk_dial_mark PRIMARY KEY,
        notification_id bigint NOT NULL,
        received_at timestamptz NOT NULL
    ) WITH (fillfactor = 50)""",
)

COMMENTS = {
    "account": "A login whose calls are heard. Its row is the lock of everything that is written about it.",
    "stream": "One Bayeux session or snapshot. What has a position up to `position` is committed.",
    "notification": "The journal: every message with its exact bytes. Rows are added and never changed.",
    "call": "One account's leg of one call, as of the last message about it.",
    "call_alias": "Which call an id names now; an id that is used again names the newer call.",
    "participant": "A participant's stay on a call.",
    "change": "One field of one call went from before to after. NULL is absence.",
    "anomaly": "Something odd about a message or a call, recorded and never refused.",
    "coverage": "Whether an account was observed (cause empty), or why not; `until` NULL is now.",
    "bayeux_session": (
        "What a restart goes on with. A credential: only the writer reads it; gone when its session is."
    ),
    "dial": "An attempt to reach a number, as of the last fact. A placed one is written before it is sent.",
    "dial_fact": (
        "What was heard of a dial, in order, and what it was then. Rows are added and never changed."
    ),
    "dial_mark": "Up to which message of an account the dials follow from its calls.",
}

SECRET = ("bayeux_session",)
"""Tables that nobody but the writer may read."""

OURS = "listener_reserve_ids(bigint), listener_ensure_partitions(integer), listener_expect(boolean)"

# The two that need it run as whoever owns the tables, so that the writer needs neither UPDATE on the sequence
# nor the right to make tables; their search path is fixed, so that nobody can put other tables before ours.
FUNCTIONS = (
    """
    CREATE FUNCTION listener_reserve_ids(wanted bigint) RETURNS bigint
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp
    AS $$
    -- Consecutive ids, whoever else is taking some. The lock is let go at once and not at the commit.
    DECLARE
        first bigint;
    BEGIN
        PERFORM pg_advisory_lock(7809644666444607597);
        BEGIN
            first := nextval('notification_id_seq');
            PERFORM setval('notification_id_seq', first + wanted - 1);
        EXCEPTION WHEN OTHERS OR query_canceled THEN
            PERFORM pg_advisory_unlock(7809644666444607597);
            RAISE;
        END;
        PERFORM pg_advisory_unlock(7809644666444607597);
        RETURN first;
    END
    $$""",
    """
    CREATE FUNCTION listener_expect(held boolean) RETURNS boolean LANGUAGE plpgsql
    AS $$
    -- What a statement was built on must hold, or nothing of the statement is done.
    BEGIN
        IF held IS NOT TRUE THEN
            RAISE EXCEPTION 'not as expected' USING ERRCODE = 'LS001';
        END IF;
        RETURN true;
    END
    $$""",
    """
    CREATE FUNCTION listener_ensure_partitions(months_ahead integer) RETURNS SETOF text
        LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp
    AS $$
    -- The partitions of this month (UTC) and the next ones; gives the names of those that it made.
    DECLARE
        month timestamp := date_trunc('month', now() AT TIME ZONE 'UTC');
        name text;
    BEGIN
        FOR step IN 0..months_ahead LOOP
            name := 'notification_' || to_char(month, 'YYYY_MM');
            IF to_regclass(name) IS NULL THEN
                BEGIN
                    EXECUTE format(
                        'CREATE TABLE %I PARTITION OF notification FOR VALUES FROM (%L) TO (%L)'
                        ' WITH (toast_tuple_target = 8128)',
                        name, month AT TIME ZONE 'UTC', (month + interval '1 month') AT TIME ZONE 'UTC');
                    RETURN NEXT name;
                EXCEPTION
                    WHEN duplicate_table THEN NULL;
                    WHEN check_violation THEN
                        RAISE WARNING '% not made: notification_default holds rows of that month', name;
                END;
            END IF;
            month := month + interval '1 month';
        END LOOP;
    END
    $$""",
)

# Group roles without a login; an administrator grants them to the logins of daemon, pages and Grafana. They
# belong to the whole server, and other databases on it may use them: a downgrade leaves them.
ROLE = """
    DO $$
    BEGIN
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN
            CREATE ROLE {role} NOLOGIN;
        END IF;
    EXCEPTION
        WHEN duplicate_object OR unique_violation THEN NULL;  -- another migration was faster
        WHEN insufficient_privilege THEN
            RAISE EXCEPTION 'the user % may not create the role {role}', current_user
                USING ERRCODE = 'insufficient_privilege', HINT = 'Let a superuser run:'
                    ' CREATE ROLE listener_writer NOLOGIN; CREATE ROLE listener_reader NOLOGIN;'
                    ' CREATE ROLE listener_auditor NOLOGIN; then upgrade again.';
    END
    $$"""
ROLES = ("listener_writer", "listener_reader", "listener_auditor")

# The contract with dashboards: changed only by adding. No message, no userData, no whole number.
MASKED = (
    "CASE WHEN length(c.number) > 4 THEN '…' || right(c.number, 2) WHEN c.number IS NOT NULL THEN '…' END"
)
VIEWS = {
    "report_calls": f"""
        SELECT c.id, a.name AS account, a.tenant, a.environment, c.opened_at, c.established_at, c.ended_at,
               c.last_heard_at, c.state, c.direction, c.outcome, c.settled, c.call_type,
               c.ended_at IS NULL AND c.settled IS NULL AS live, c.ring_s, c.talk_s, c.hold_s, c.hold_count,
               c.wrap_s, c.server_duration_s, c.notifications, c.anomalies, {MASKED} AS number_masked
        FROM call c JOIN account a ON a.id = c.account_id""",  # noqa: S608 - no input
    "report_changes": """
        SELECT h.call_id AS call, a.name AS account, a.tenant, h.at, h.field,
               CASE WHEN h.field IN ('state', 'mute', 'recording') THEN h.before #>> '{}' END AS before,
               CASE WHEN h.field IN ('state', 'mute', 'recording') THEN h.after #>> '{}' END AS after
        FROM change h JOIN call c ON c.id = h.call_id JOIN account a ON a.id = c.account_id""",
    "report_notifications": """
        SELECT n.id, n.received_at, a.name AS account, a.tenant, n.source, n.channel, n.message_type,
               n.notification_type, n.reason IS NULL AS recognised, n.call_id AS call, n.server_at,
               octet_length(n.raw) AS bytes
        FROM notification n JOIN account a ON a.id = n.account_id""",
    "report_anomalies": """
        SELECT y.notification_id AS notification, y.call_id AS call, a.name AS account, a.tenant, y.at, y.kind
        FROM anomaly y LEFT JOIN call c ON c.id = y.call_id LEFT JOIN account a ON a.id = c.account_id""",
    "report_coverage": """
        SELECT a.name AS account, a.tenant, v.since, coalesce(v.until, now()) AS until,
               v.cause = '' AS observed, v.cause, v.until IS NULL AS present, v.seen_at
        FROM coverage v JOIN account a ON a.id = v.account_id""",
    "report_dials": f"""
        SELECT c.id, a.name AS account, a.tenant, a.environment, c.system, c.origin, c.requested_at, c.state,
               c.reached, c.ringing_at, c.connected_at, c.ended_at, c.outcome, c.leg, c.ended_by,
               nullif(concat_ws(' ', c.cause_field, c.cause_code), '') AS cause, c.confidence, c.expired,
               c.corrected, c.call_id AS call, c.match_confidence, c.outcome IS NULL AS waiting,
               greatest(extract(epoch FROM c.ringing_at - c.requested_at), 0)::double precision
                   AS time_to_ring_s,
               greatest(extract(epoch FROM c.connected_at - c.requested_at), 0)::double precision
                   AS time_to_answer_s,
               CASE WHEN length(c.number_normalised) > 8 THEN left(c.number_normalised, 4) END
                   AS number_prefix,
               {MASKED} AS number_masked
        FROM dial c JOIN account a ON a.id = c.account_id WHERE c.merged_into IS NULL""",  # noqa: S608
}

GRANTS = (
    f"REVOKE ALL ON FUNCTION {OURS} FROM PUBLIC",
    f"GRANT EXECUTE ON FUNCTION {OURS} TO listener_writer",
    # What happened is added to, and no more; what follows from it is kept up to date.
    "GRANT SELECT, INSERT ON notification, change, anomaly, dial_fact TO listener_writer",
    """
    GRANT SELECT, INSERT, UPDATE ON account, stream, call, call_alias, participant, coverage, dial, dial_mark
        TO listener_writer""",
    "GRANT SELECT ON alembic_version TO listener_writer, listener_auditor",
    f"GRANT SELECT, INSERT, UPDATE, DELETE ON {', '.join(SECRET)} TO listener_writer",
    f"GRANT SELECT ON {', '.join(name for name in COMMENTS if name not in SECRET)} TO listener_auditor",
    f"GRANT SELECT ON {', '.join(VIEWS)} TO listener_reader, listener_auditor",
)


def upgrade() -> None:
    schema = op.get_bind().scalar(text("SELECT quote_ident(current_schema())"))
    for statement in TABLES:
        op.execute(statement)
    for table, words in COMMENTS.items():
        op.execute(text(f"COMMENT ON TABLE {table} IS '{words.replace(chr(39), chr(39) * 2)}'"))
    for function in FUNCTIONS:
        op.get_bind().exec_driver_sql(function.format(schema=schema))
    for name, query in VIEWS.items():
        op.get_bind().exec_driver_sql(f"CREATE VIEW {name} AS {query}")
    for role in ROLES:
        op.get_bind().exec_driver_sql(ROLE.format(role=role))
    for grant in GRANTS:
        op.execute(grant)
    op.execute("SELECT listener_ensure_partitions(3)")


def downgrade() -> None:
    op.execute(f"DROP VIEW {', '.join(VIEWS)}")
    op.execute(f"DROP FUNCTION {OURS}")
    op.execute(f"DROP TABLE {', '.join(reversed(COMMENTS))}")
    op.execute("DROP TYPE call_written")
    op.execute("DROP SEQUENCE notification_id_seq")
    op.execute("REVOKE ALL ON alembic_version FROM listener_writer, listener_auditor")
