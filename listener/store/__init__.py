"""REMEMBERS. The only place that knows SQL.

::

    embedded   runs the bundled PostgreSQL, where no other is configured
    schema     the tables, as SQLAlchemy knows them: what Alembic aims at
    migrate    brings a database to that schema, or says that it is not there
    connect    how anybody here reaches a database, and which refusals may pass by themselves
    journal    the write side: raw messages, calls and coverage, one transaction a batch (asyncpg)
      batch    what one of its transactions does
      rows     calls as rows, and the statements over many of them
      ledger   coverage, which stands end to end
    history    the read side: the auditor's questions, each answered with the share that was observed
"""
