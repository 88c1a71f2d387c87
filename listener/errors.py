"""The errors that `listener` raises on purpose, drawn as a tree.

::

    ListenerError                what we say to a person: one sentence with the cause and the cure
    ├── SettingsError            a setting is wrong; names the file, the key and what to write instead
    ├── InvalidRequest           a dial, a recording or a list was asked for wrongly: nothing was sent
    ├── NotKnown                 what was named is not there: an account, an extension, a dial
    ├── NotAllowed               the settings do not let this listener do it, or it cannot be done there
    ├── KeyReused                an idempotency key was used before, for another request: nothing was sent
    ├── TooMany                  more at the same time than is taken: nothing was sent, ask again
    ├── StoreError               the database refused or is not as it must be
    │   ├── StoreUnavailable     it may answer later: retry (connection, start-up, failover, read-only)
    │   ├── SchemaOutdated       the schema is not the one this version needs: `listener db upgrade`
    │   └── SpoolFull            the spool takes no more now: nothing is dropped, we stop asking
    └── RemoteError              an outside party refused us
        ├── LoginRefused         the credentials are wrong: no retry helps, a person must act
        └── RemoteUnavailable    it may answer later: retry

A message that was heard never raises any of these: what cannot be understood is kept and counted
(`listener.core.calls.Unrecognised`, `Anomaly`).
"""


class ListenerError(Exception):
    """Something that a person should read: the message names the cause and the cure."""


class SettingsError(ListenerError):
    """A setting is wrong; the message names the file, the key and what to write instead."""


class InvalidRequest(ListenerError):
    """A request is wrong; one to an outside party was not sent. `argument` is the parameter as its vendor
    spells it; the message says which rule it broke, and what to write instead."""

    def __init__(self, argument: str, rule: str, cure: str) -> None:
        super().__init__(f"{argument}: {rule}; {cure}")
        self.argument = argument


class NotKnown(ListenerError):
    """What was named is not there: an account, an extension, a dial."""


class NotAllowed(ListenerError):
    """The settings do not let this listener do it, or the system cannot."""


class KeyReused(ListenerError):
    """An idempotency key was used before, for another request; nothing was sent."""


class TooMany(ListenerError):
    """More was asked for at the same time than is taken; nothing was sent, and it may be asked again."""


class StoreError(ListenerError):
    """The database refused, or is not as it must be."""


class StoreUnavailable(StoreError):
    """The database does not answer now; the same call may succeed later."""


class SchemaOutdated(StoreError):
    """The schema is not the one that this version needs; `listener db upgrade` mends it."""


class SpoolFull(StoreError):
    """The spool takes no more now (its bound, the disk, another process); it may later."""


class RemoteError(ListenerError):
    """An outside party refused a request."""


class LoginRefused(RemoteError):
    """The credentials were refused: no retry helps until a person changes them."""


class RemoteUnavailable(RemoteError):
    """An outside party does not answer now; the same call may succeed later."""
