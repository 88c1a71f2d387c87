"""Settings: what each may be by itself, and what several of them mean together."""

import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from listener.settings import SECTIONS, Log, Settings

BASIC = """
[environments.prod]
base_url = "https://gws.example.com/"

[[accounts]]
environment = "prod"
login = "agent1"
password = "secret"
"""


def _settings(text: str) -> Settings:
    """What a text sets, each value checked by itself and none read from elsewhere."""
    return Settings.model_validate(tomllib.loads(text))


def test_settings_are_frozen() -> None:
    """Nobody changes a setting after it was checked."""
    settings = _settings(BASIC)
    with pytest.raises(ValidationError, match="frozen"):
        settings.log = Log()  # type: ignore[misc]  # this is what must not be possible
    with pytest.raises(ValidationError, match="frozen"):
        settings.operations.port = 1  # type: ignore[misc]


def test_settings_read_nothing_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what they are given counts: who reads the environment also keeps which variable said it."""
    monkeypatch.setenv("LISTENER_LOG__LEVEL", "debug")
    assert _settings("").log.level == "info"


def test_every_setting_has_a_cure() -> None:
    """A refused setting can only be explained if it is described."""
    undescribed = [
        f"{model.__name__}.{name}"
        for model in SECTIONS.values()
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert undescribed == []


def test_every_section_has_its_model() -> None:
    """A section without a model here could be neither checked nor explained where it is read."""
    assert set(SECTIONS) == set(Settings.model_fields) - {"accounts_file"}


# ── Logging in ────────────────────────────────────────────────────────────────────────────────────────


def test_the_three_ways_to_log_in() -> None:
    """Basic by login and password; bearer by the account's or the environment's token; headers as given."""
    settings = _settings(
        """
        [environments.a]
        base_url = "http://a"
        [environments.b]
        base_url = "http://b"
        auth = "bearer"
        token = "t2"
        [environments.c]
        base_url = "http://c"
        auth = "headers"
        headers = { X-User = "{login}", X-Key = "{password}" }
        [[accounts]]
        environment = "a"
        login = "Aladdin"
        password = "open sesame"
        [[accounts]]
        environment = "b"
        login = "own"
        password = "t1"
        [[accounts]]
        environment = "b"
        login = "shared"
        [[accounts]]
        environment = "c"
        login = "me"
        password = "k"
        """
    )
    assert [settings.login_headers(account) for account in settings.accounts] == [
        {"Authorization": "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="},  # the example of RFC 7617, section 2
        {"Authorization": "Bearer t1"},
        {"Authorization": "Bearer t2"},
        {"X-User": "me", "X-Key": "k"},
    ]


def test_the_session_that_logs_agents_in_is_a_choice() -> None:
    """StartContactCenterSession is off, on for an environment, and off again for an account of it."""
    off = _settings(BASIC)
    assert not off.logs_agent_in(off.accounts[0])
    on = _settings(
        BASIC.replace("[[accounts]]", "start_contact_center_session = true\n[[accounts]]")
        + "[[accounts]]\nenvironment = 'prod'\nlogin = 'b'\npassword = 'x'\n"
        + "start_contact_center_session = false\n",
    )
    assert [on.logs_agent_in(account) for account in on.accounts] == [True, False]


# ── Dials ─────────────────────────────────────────────────────────────────────────────────────────────

PBXS = """
[noojee.office]
base_url = "https://noojee.example.com/"
extensions = { 101 = "ann", 102 = "desk" }
tenant = "north"
[click2dial.c2d]
base_url = "http://pbx.example.com:8300"
extensions = { 201 = "bob" }
"""


def test_nobody_dials_who_was_not_asked_for_it() -> None:
    """Dialling is off; an environment, an account or a PBX switches it on for itself."""
    quiet = _settings(BASIC + PBXS)
    assert not quiet.anybody_dials()
    assert not quiet.may_dial(quiet.accounts[0])
    everybody = _settings(BASIC.replace("[[accounts]]", "dials = true\n[[accounts]]"))
    assert everybody.may_dial(everybody.accounts[0])
    assert everybody.anybody_dials()
    one = _settings(BASIC + "dials = true\n" + BASIC[BASIC.index("[[accounts]]") :])
    assert [one.may_dial(account) for account in one.accounts] == [True, False]
    assert one.anybody_dials()
    pbx = _settings(BASIC + PBXS.replace("[click2dial", "dials = true\n[click2dial"))
    assert pbx.anybody_dials()
    assert not pbx.may_dial(pbx.accounts[0])


def test_an_extension_belongs_to_an_account() -> None:
    """Each extension is an account of its PBX, with the PBX's tenant."""
    settings = _settings(BASIC + PBXS)
    assert settings.noojee["office"].base_url == "https://noojee.example.com"
    assert settings.pbx_accounts() == {
        "ann": ("north", "office"),
        "desk": ("north", "office"),
        "bob": ("", "c2d"),
    }


# ── The spool's place ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("store", "environ", "place"),
    [
        ({"spool_dir": "/x/spool", "dsn": "postgresql:///x"}, {"STATE_DIRECTORY": "/state"}, "/x/spool"),
        ({}, {"STATE_DIRECTORY": "/state"}, "listener-data-spool"),
        ({"data_dir": "/data/postgres"}, {}, "/data/postgres-spool"),
        ({"dsn": "postgresql:///x"}, {"STATE_DIRECTORY": "/state:/other"}, "/state/spool"),
        ({"dsn": "postgresql:///x"}, {"XDG_STATE_HOME": "/xdg"}, "/xdg/listener/spool"),
        ({"dsn": "postgresql:///x"}, {"XDG_STATE_HOME": "xdg"}, "~/.local/state/listener/spool"),
    ],
)
def test_the_spool_lies_where_it_is_set_or_beside_the_data(
    store: dict[str, str], environ: dict[str, str], place: str
) -> None:
    """As set; else beside the bundled server; else in the state directory of systemd or XDG."""
    found = Settings.model_validate({"store": store}).spool_directory(environ)
    assert found == Path(place).expanduser()
