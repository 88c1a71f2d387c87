"""The database fixtures, until the tests' conftest registers them for all."""

from tests.support.database import database, empty_database, journal, postgres, sql, template

__all__ = ["database", "empty_database", "journal", "postgres", "sql", "template"]
