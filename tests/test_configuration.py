"""Configuration: where settings come from, and that every refusal names its place and cure."""

import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from listener import configuration
from listener.configuration import find, load
from listener.errors import SettingsError

SECRET = "hunter2-do-not-show"

Write = Callable[[str, str], Path]

BASIC = f"""
[environments.prod]
base_url = "https://gws.example.com/"

[[accounts]]
environment = "prod"
login = "agent1"
password = "{SECRET}"
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file below the test's directory, with common indentation removed."""

    def to_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return to_file


def _problems(path: Path | None, environ: Mapping[str, str] | None = None, **more: Any) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        load(path, environ=environ or {}, **more)
    assert SECRET not in str(refused.value)
    return str(refused.value).splitlines()


def test_nothing_configured_is_no_error() -> None:
    """With no file and no variable everything has its default, and there is no account."""
    loaded = load(None, environ={})
    assert loaded.accounts == ()
    assert loaded.store.dsn is None
    assert loaded.operations.host == "127.0.0.1"


def test_an_account_and_its_environment(write: Write) -> None:
    """The smallest useful file: one GWS, one account; the rest are defaults."""
    loaded = load(write("listener.toml", BASIC), environ={})
    (account,) = loaded.accounts
    environment = loaded.environment(account)
    assert account.name == "agent1"
    assert environment.base_url == "https://gws.example.com"
    assert environment.channels == ("/v2/me/calls", "/v2/me/devices")
    assert not environment.websocket
    assert not loaded.logs_agent_in(account)


def test_each_source_overrides_the_one_before(write: Write, tmp_path: Path) -> None:
    """TOML < secrets directory < environment < flags, setting by setting within one section."""
    path = write("listener.toml", "[operations]\nport = 1\nhost = '127.0.0.2'\n[log]\nlevel = 'error'\n")
    write("secrets/listener_operations__port", "2\n")
    secrets = tmp_path / "secrets"
    environ = {"LISTENER_OPERATIONS__PORT": "3"}
    assert load(path, environ={}).operations.port == 1
    assert load(path, environ={}, secrets_dir=secrets).operations.port == 2
    assert load(path, environ=environ, secrets_dir=secrets).operations.port == 3
    loaded = load(path, {"operations.port": "4"}, environ=environ, secrets_dir=secrets)
    assert loaded.operations.port == 4
    assert loaded.operations.host == "127.0.0.2"
    assert loaded.log.level == "error"


@pytest.mark.parametrize("variable", ["LISTENER_SECRETS_DIR", "CREDENTIALS_DIRECTORY"])
def test_the_secrets_directory_by_variable(write: Write, tmp_path: Path, variable: str) -> None:
    """A DSN comes out of a secret file, in the directory that we or systemd name, in any case of letters."""
    write("secrets/LISTENER_STORE__DSN", f"postgresql://listener:{SECRET}@db/listener\n")
    loaded = load(None, environ={variable: str(tmp_path / "secrets")})
    assert loaded.store.dsn is not None
    assert loaded.store.dsn.get_secret_value().endswith("@db/listener")


def test_lists_and_sections_from_the_environment() -> None:
    """A whole environment can be given by variables; lists are JSON."""
    environ = {
        "LISTENER_ENVIRONMENTS__PROD__BASE_URL": "http://gws",
        "LISTENER_ENVIRONMENTS__PROD__CHANNELS": '["/v2/me/calls"]',
        "LISTENER_ACCOUNTS": '[{"environment": "prod", "login": "a", "password_env": "LISTENER_A_PASSWORD"}]',
        "LISTENER_A_PASSWORD": SECRET,
    }
    loaded = load(None, environ=environ)
    assert loaded.environments["prod"].channels == ("/v2/me/calls",)
    assert loaded.login_headers(loaded.accounts[0])["Authorization"].startswith("Basic ")


def test_no_secret_is_ever_shown(write: Write) -> None:
    """Neither repr nor str nor JSON of the settings shows a password, a token, a header or a DSN."""
    path = write(
        "listener.toml",
        BASIC
        + f"""
        [environments.two]
        base_url = "https://two"
        auth = "bearer"
        token = "{SECRET}"
        [environments.three]
        base_url = "https://three"
        auth = "headers"
        headers = {{ X-Key = "{SECRET}" }}
        [operations]
        token = "{SECRET}"
        [store]
        dsn = "postgresql://listener:{SECRET}@db/listener"
        """,
    )
    loaded = load(path, environ={})
    for shown in (repr(loaded), str(loaded), loaded.model_dump_json(), repr(loaded.model_dump())):
        assert SECRET not in shown


# ── Refusals ──────────────────────────────────────────────────────────────────────────────────────────


def test_every_problem_is_named_with_its_line_and_cure(write: Write) -> None:
    """One run names all that is wrong: file, line, key, and what to write instead."""
    path = write(
        "listener.toml",
        """\
        acounts_file = "x.csv"

        [operations]
        prot = 9
        data_dir = "/x"

        [environments.prod]
        base_url = "gws.example.com"
        auth = "basc"
        channels = [
          "/v2/me/calls",
          "oops",
        ]
        [environments."other one"]
        token = 5

        [[accounts]]
        environment = "prod"
        login = "a"
        [[accounts]]
        passwrd = "hunter2-do-not-show"
        environment = "prod"
        [limits]
        stop_s = 1_000
        """,
    )
    found = {problem.partition(": ")[0].removeprefix(f"{path}:"): problem for problem in _problems(path)}
    for line, part in {
        "1": 'no setting "acounts_file" at the top of the file; did you mean "accounts_file"?',
        "4": 'no setting "prot" in [operations]; did you mean "port"?',
        "5": 'no setting "data_dir" in [operations]; it belongs to [store]',
        "8": "environments.prod.base_url: it must begin with http:// or https://",
        "9": "environments.prod.auth: should be 'basic', 'bearer' or 'headers'; write",
        "10": "'oops' does not",
        "14": "[environments.other one] lacks base_url: the address of the GWS",
        "15": "environments.other one.token: should be a valid string",
        "20": "[[accounts]] lacks login",
        "21": 'no setting "passwrd" in [[accounts]]; did you mean "password"?',
        "24": "limits.stop_s: should be less than or equal to 600; write seconds",
    }.items():
        assert part in found[line], line
    assert len(found) == 11


@pytest.mark.parametrize(
    ("text", "line"),
    [("a = 1\nb = = 2\n", 2), ("a = 1\nb = [1,\n\n", 3), ("[store\n", 1), ("a = 1\na = 2\n", 2)],
)
def test_broken_toml_names_the_line(write: Write, text: str, line: int) -> None:
    """A file that is not TOML is refused with the line where it stops being TOML."""
    path = write("listener.toml", text)
    (problem,) = _problems(path)
    assert problem.startswith(f"{path}:{line}: this is not TOML: ")


def test_lines_survive_whatever_toml_allows(write: Write) -> None:
    """Lines are right after strings that look like headers, comments and inline tables."""
    path = write(
        "listener.toml",
        '''\
        # a comment
        [environments.prod] # another
        base_url = "http://gws"
        token_env = """
        [operations]
        port = 1
        """
        headers = { A = "x", "B" = 5 }

        [log]
        format
          = "josn"
        '''.replace("format\n          = ", "format = "),
    )
    problems = _problems(path, {"[operations]\nport = 1": "x"})
    assert [problem.partition(": ")[0] for problem in problems] == [f"{path}:8", f"{path}:11"]
    # A name that is not given its value there is told in one line all the same.
    assert len(_problems(path)) == 3


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        (
            {"LISTENER_OPERATION__PORT": "1"},
            'LISTENER_OPERATION__PORT: there is no such setting; did you mean "LISTENER_OPERATIONS__PORT"?',
        ),
        ({"LISTENER_OPERATIONS__PROT": "1"}, 'LISTENER_OPERATIONS__PROT: there is no setting "prot"'),
        (
            {"LISTENER_OPERATIONS__PORT": "x"},
            "LISTENER_OPERATIONS__PORT: operations.port must be a whole number; write a port",
        ),
        (
            {"LISTENER_LOG_LEVEL": "info"},
            'LISTENER_LOG_LEVEL: there is no such setting; did you mean "LISTENER_LOG__LEVEL" (two unders',
        ),
        ({"LISTENER_ZZZ": "1"}, "LISTENER_ZZZ: there is no such setting; known are store, "),
        ({"LISTENER_STORE__DSN": ""}, "LISTENER_STORE__DSN: it is empty; give a value, or leave it out"),
        ({"LISTENER_ACCOUNTS_FILE": ""}, "LISTENER_ACCOUNTS_FILE: it is empty"),
        ({"LISTENER_STORE__DSN": SECRET}, "LISTENER_STORE__DSN: store.dsn: it must begin with postgresql://"),
        ({"LISTENER_ACCOUNTS": "[" + SECRET}, "LISTENER_ACCOUNTS: a list or section here must be JSON"),
    ],
)
def test_a_wrong_variable_is_named(environ: dict[str, str], part: str) -> None:
    """What is wrong in the environment is named by its variable, misspelt names included."""
    (problem,) = _problems(None, environ)
    assert problem.startswith("environment variable ")
    assert part in problem


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("listener_stor__dsn", 'there is no such setting; did you mean "listener_store__dsn"?'),
        ("listener_store_dsn", 'did you mean "listener_store__dsn" (two underscores)?'),
        ("store__dsn", "needs the prefix; name it listener_store__dsn"),
        ("listener_operations__port", "operations.port must be a whole number"),
    ],
)
def test_a_wrong_secret_file_is_named(write: Write, name: str, part: str) -> None:
    """A secret file that sets nothing, or nonsense, is refused by its path; others' files are left alone."""
    path = write(f"secrets/{name}", SECRET)
    write("secrets/tls.key", SECRET)
    (problem,) = _problems(None, secrets_dir=path.parent)
    assert str(path) in problem
    assert part in problem


def test_a_wrong_flag_is_named() -> None:
    """What is wrong in a flag is named by the flag."""
    (problem,) = _problems(None, overrides={"log.level": "loud"})
    assert problem.startswith("flag --set log.level: log.level: should be 'debug'")


def test_a_flag_that_sets_nothing_is_named() -> None:
    """A flag that names no setting, a section as a value or a value as a section is refused, not a crash."""
    (problem,) = _problems(None, overrides={"logg.level": "info"})
    assert problem == 'flag --set logg.level: there is no such setting; did you mean "log.level"?'
    (problem,) = _problems(None, overrides={"store.dsn": ""})
    assert problem == "flag --set store.dsn: it is empty; give a value, or leave it out"
    (problem,) = _problems(None, overrides={"log": "x"})
    assert problem.startswith("flag --set log: ")
    (problem,) = _problems(None, overrides={"log.level.deep": "x"})
    assert problem.startswith("flag --set log.level.deep: ")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    """A missing configuration, secrets directory or accounts file is named with the way to say another."""
    (problem,) = _problems(tmp_path / "none.toml")
    assert "none.toml: it cannot be read (No such file or directory); name another file with -c" in problem
    (problem,) = _problems(None, secrets_dir=tmp_path / "none")
    assert problem.startswith(f"--secrets-dir: there is no directory {tmp_path / 'none'}; name another")
    (problem,) = _problems(None, {"LISTENER_SECRETS_DIR": "none"})
    assert problem.startswith("environment variable LISTENER_SECRETS_DIR: there is no directory none; name")
    (problem,) = _problems(None, {"LISTENER_ACCOUNTS_FILE": str(tmp_path / "none.csv")})
    assert problem.startswith("environment variable LISTENER_ACCOUNTS_FILE: accounts_file")


def test_an_empty_secret_file_is_named(write: Write) -> None:
    """A secret that somebody forgot to fill in is refused, whatever it is for."""
    path = write("secrets/listener_log__level", "\n")
    (problem,) = _problems(None, secrets_dir=path.parent)
    assert problem == f"secret file {path}: it is empty; give a value, or leave it out"


def test_problems_of_both_kinds_are_named_together(write: Write) -> None:
    """A value that cannot be, and values that do not go together, are named in one run."""
    path = write("listener.toml", BASIC.replace('prod"', 'prd"') + "[operations]\nhost='0.0.0.0'\nport=-1\n")
    problems = _problems(path)
    assert len(problems) == 3
    for problem, part in zip(
        problems,
        ['no [environments."prd"]', "is not loopback", "operations.port: should be greater"],
        strict=True,
    ):
        assert part in problem


def test_one_wrong_section_hides_no_problem_of_another(write: Write) -> None:
    """Whoever mends what is named has mended all: also accounts of a wrong environment, beside a wrong
    account, and the names of PBXs are looked at; and it is told in the order of the files' lines."""
    csv = write("accounts.csv", f"environment,login,password,dials\nlab,a,{SECRET},maybe\nlba,b,{SECRET},\n")
    path = write(
        "listener.toml",
        f"""\
        accounts_file = "accounts.csv"
        [noojee.lab]
        base_url = "https://noojee.example.com"
        api_key = "{SECRET}"
        subscribe = 5
        extensions = {{ 101 = "agent1" }}
        [[accounts]]
        environment = "prod"
        login = "agent1"
        [[accounts]]
        environment = "prd"
        login = "agent2"
        password = "{SECRET}"
        [[accounts]]
        login = ""
        environment = "prod"
        password_file = "none"
        [store]
        dsn = "postgresql://[nowhere"
        [operations]
        host = "0.0.0.0"
        prot = 9
        [environments.prod]
        base_url = "gws.example.com"
        [environments.lab]
        base_url = "http://lab"
        verify = "perhaps"
        token_env = "NOT_SET"
        [log]
        level = "loud"
        """,
    )
    problems = _problems(path, {"LISTENER_OPERATION__PORT": "1"}, overrides={"log.format": "x"})
    told = [
        (f"{path}:2", "the name lab is also an [environments.lab]"),
        (f"{path}:5", "noojee.lab.subscribe must be true or false"),
        (f"{path}:6", "the account agent1 is taken by [[accounts]] agent1"),
        (f"{path}:7", "account agent1 lacks password_file"),
        (f"{path}:10", 'account agent2: there is no [environments."prd"]; did you mean "prod"?'),
        (f"{path}:14", "password_file"),
        (f"{path}:15", "[[accounts]] login is empty"),
        (f"{path}:19", "store.dsn: it cannot be read as an address"),
        (f"{path}:21", "operations.host 0.0.0.0 is not loopback"),
        (f"{path}:22", 'no setting "prot" in [operations]'),
        (f"{path}:24", "environments.prod.base_url: it must begin with"),
        (f"{path}:25", "token_env: the variable NOT_SET is not set"),
        (f"{path}:27", "environments.lab.verify must be true or false"),
        (f"{path}:30", "log.level: should be"),
        (f"{csv}:2", "dials must be true or false"),
        (f"{csv}:3", 'account b: there is no [environments."lba"]; did you mean "lab"?'),
        ("environment variable LISTENER_OPERATION__PORT", "there is no such setting"),
        ("flag --set log.format", "log.format: should be"),
    ]
    for problem, (place, part) in zip(problems, told, strict=True):
        assert problem.startswith(f"{place}: "), problem
        assert part in problem, problem
        assert re.search(r"; |did you mean|known are|\(.*\)", problem.removeprefix(place)), (
            f"no cure: {problem}"
        )


def test_a_misspelt_table_is_looked_into(write: Write) -> None:
    """What is wrong in it is told in the same run, and whoever names what it holds names something. So it is
    beside a table that is spelt as it should."""
    path = write(
        "listener.toml",
        f"""\
        [enviroments.prod]
        base_url = "https://gws.example.com"
        auth = "beare"
        ca_file = "none.pem"
        [environment.test]
        base_ulr = "https://test.example.com"
        [environments.lab]
        base_url = "http://lab"
        [[accounts]]
        environment = "prod"
        login = "a"
        [[acounts]]
        environment = "lab"
        login = "b"
        [[acounts]]
        environment = "tst"
        lgoin = "c"
        password = "{SECRET}"
        [noojee_.n]
        base_url = "n"
        api_key = "{SECRET}"
        extensions = {{ 101 = "a" }}
        [operations]
        port = "x"
        [operation]
        port = 9
        host = "0.0.0.0"
        """,
    )
    told = [
        (1, 'no setting "enviroments" at the top of the file; did you mean "environments"?'),
        (3, "environments.prod.auth: should be"),
        (4, f"ca_file {path.parent}/none.pem: it cannot be read"),
        (5, 'no setting "environment" at the top of the file; did you mean "environments"?'),
        (6, 'no setting "base_ulr" in [environments.test]; did you mean "base_url"?'),
        (12, 'no setting "acounts" at the top of the file; did you mean "accounts"?'),
        (12, "account b lacks password_file"),
        (15, 'this account: there is no [environments."tst"]; did you mean "test"?'),
        (17, 'no setting "lgoin" in [[accounts]]; did you mean "login"?'),
        (19, 'no setting "noojee_" at the top of the file; did you mean "noojee"?'),
        (20, "noojee.n.base_url: it must begin with"),
        (22, "the account a is taken by [[accounts]] a"),
        (24, "operations.port must be a whole number"),
        (25, 'no setting "operation" at the top of the file; did you mean "operations"?'),
        (27, "operations.host 0.0.0.0 is not loopback"),
    ]
    for problem, (line, part) in zip(_problems(path, listens=True), told, strict=True):
        assert problem.startswith(f"{path}:{line}: "), problem
        assert part in problem, problem


@pytest.mark.parametrize(
    "text",
    [
        "environment = 5\n",
        "[extensions]\n101 = 'a'\n",
        "[acounts]\nlgoin = 'a'\n",
        "[[operation]]\nprot = 1\n",
        "[environment]\nbase_ulr = 'http://e'\n",
        "acounts = [1]\n",
        "operation = 2026-03-02\n",
    ],
)
def test_what_cannot_have_been_meant_as_a_table_is_not_looked_into(write: Write, text: str) -> None:
    """It would only be told that it is none."""
    (problem,) = _problems(write("listener.toml", text))
    assert "at the top of the file; " in problem


def test_the_configuration_is_told_before_thousands_of_rows(write: Write) -> None:
    """What is wrong with many accounts does not push out what is wrong with the configuration."""
    write("accounts.csv", "environment,login\n" + "prod\n" * 5000)
    problems = _problems(write("listener.toml", ENVIRONMENT + "[log]\nlevel = 'x'\n"))
    assert "log.level" in problems[0]


WHOLE = f"""\
[environments.e]
base_url = 'http://e'
[[accounts]]
environment = 'e'
login = 'a'
password = '{SECRET}'
"""
BARE = WHOLE.replace("password", "#")
PBX = "[noojee.n]\nbase_url = 'https://n'\napi_key = 'k'\n"


@pytest.mark.parametrize(
    ("text", "environ", "part"),
    [
        (BARE.replace("//e'", "//e'\nauth = 'basc'"), {}, "auth"),
        (BARE + "pasword = 'x'\n", {}, 'did you mean "password"'),
        (BARE + "password_file = 'none'\n", {}, "password_file"),
        (BARE.replace("//e'", "//e'\nauth = 'bearer'\ntoken_file = 'none'"), {}, "token_file"),
        (BARE.replace("//e'", "//e'\nauth = 'bearer'\ntokn = 'x'"), {}, '"token"'),
        (BARE.replace("//e'", "//e'\nauth = 'headers'\nheaders_env = 'NONE'"), {}, "NONE is not set"),
        (BARE.replace("//e'", "//e'\nauth = 'headers'\nheader = 'x'"), {}, '"headers"'),
        (
            BARE.replace("//e'", "//e'\nauth = 'headers'\nheaders_env = 'H'"),
            {"H": "no colon"},
            "line 1 of the given headers",
        ),
        (WHOLE.replace("[environments", "[enviroments"), {}, '"environments"'),
        (WHOLE.replace("[environments.e]\nbase_url = 'http://e'", "environments = 5"), {}, "environments"),
        (WHOLE.replace("[environments.e]\nbase_url = 'http://e'", "environments.e = 5"), {}, "environments"),
        (WHOLE.replace("base_url", "base_ur"), {}, '"base_url"'),
        (WHOLE.replace("login", "logn"), {}, '"login"'),
        (WHOLE.replace("[[accounts]]", "[[acounts]]"), {}, '"accounts"'),
        (WHOLE.replace("'http://e'", "'e'") + PBX.replace("noojee.n", "noojee.e"), {}, None),
        (WHOLE + PBX.replace("https://n", "n"), {}, "base_url"),
        (WHOLE + PBX.replace("'k'", "5"), {}, "api_key"),
        (WHOLE + PBX + "dials = true\n[api]\ntokenfile = 'x'\n", {}, '"token_file"'),
        (WHOLE + PBX + "dials = true\n[apis]\ntoken = 'x'\n", {}, '"api"'),
        (WHOLE + PBX + "dials = true\n", {"LISTENER_API__TOKEN": ""}, "LISTENER_API__TOKEN"),
        (WHOLE + PBX + "dials = true\n", {"LISTENER_API_TOKEN": "x"}, "LISTENER_API_TOKEN"),
        ("[operations]\nhost = '::'\n", {"LISTENER_OPERATIONS__TOKEN": ""}, "LISTENER_OPERATIONS__TOKEN"),
        ("[operations]\nhost = '::'\n", {"LISTENER_OPERATION__TOKEN": "x"}, "LISTENER_OPERATION__TOKEN"),
        ("[operations]\nhost = '::'\n", {"LISTENER_SECRETS_DIR": "none"}, "there is no directory none"),
        (WHOLE, {"LISTENER_ENVIRONMENTS": "{"}, "must be JSON"),
        (BARE, {"LISTENER_ACCOUNTS": "["}, "must be JSON"),
        (
            "[click2dial.c]\nbase_url = 'http://c'\ndials = true\nwebhook_tokn = 'x'\n[api]\ntoken = 't'\n",
            {},
            '"webhook_token"',
        ),
    ],
)
def test_what_only_follows_is_not_told(
    write: Write, text: str, environ: dict[str, str], part: str | None
) -> None:
    """One mistake is one line: what would be in order if that were mended is not named beside it."""
    path = write("listener.toml", text)
    problems = _problems(path, environ, listens=True) if "accounts" in text else _problems(path, environ)
    if part is None:
        assert len(problems) == 2  # the address, and a name that is taken whatever the address is
    else:
        (problem,) = problems
        assert part in problem


def test_what_only_follows_from_another_source_is_not_told(write: Write) -> None:
    """A misspelt flag and a misspelt secret file may be what is missed, as a misspelt setting may."""
    path = write("listener.toml", "[operations]\nhost = '::'\n")
    (problem,) = _problems(path, overrides={"operation.token": "x"})
    assert "flag --set operation.token" in problem
    secret = write("secrets/listener_operation__token", SECRET)
    (problem,) = _problems(path, secrets_dir=secret.parent)
    assert str(secret) in problem


def test_accounts_that_are_not_known_are_not_compared(write: Write) -> None:
    """Two that lack their logins are not one account, nor of one name, and what else they lack is told."""
    nobody = "[[accounts]]\nenvironment = 'e'\nlogin = ''\n"
    problems = _problems(write("listener.toml", WHOLE + 2 * nobody + PBX + "extensions = { 1 = 'a' }\n"))
    assert [problem.partition(": ")[2][:28] for problem in problems] == [
        "this account lacks password_",
        "[[accounts]] login is empty;",
        "this account lacks password_",
        "[[accounts]] login is empty;",
        "the account a is taken by [[",
    ]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "noojee.c = 5\n[click2dial.c]\nbase_url = 'http://c'\n" + WHOLE,
            ["is no table", "also a [noojee.c]"],
        ),
        (PBX + "extensions = 5\n", ["noojee.n.extensions: should be"]),
    ],
)
def test_a_pbx_that_is_wrong_is_there(write: Write, text: str, parts: list[str]) -> None:
    """Its name is taken, and its accounts are somebody to listen to."""
    problems = _problems(write("listener.toml", text), listens=True)
    for problem, part in zip(problems, parts, strict=True):
        assert part in problem


@pytest.mark.parametrize(
    ("csv", "parts"),
    [
        ("environment,login,pasword\ne,a,x\n", ['"pasword"']),
        ("enviroment,login,password\ne,a,x\n", ['"enviroment"']),
        ("login,password\na,x\n", ["the column environment"]),
        ("\na,x\n", ["the column environment and the column login"]),
        ("environment,login,password,password\ne,a,x,x\n", ["password"]),
        ("environment,login,colour,tnant\nx,a,,\n", ['"colour"', '"tnant"', '[environments."x"]']),
        ("environment,login,password\ne,a\ne,b,x\ne,b,x\n", ["2 values for 3", "already an account"]),
        ('environment,login,password\nx,a,x\ne,b,"x\n', ['[environments."x"]', "not CSV"]),
        ("environment,login,password,dials\ne,a,,maybe\n", ["dials must be", "account a lacks"]),
        ("environment,login,password\n", ["no account to listen to"]),
    ],
)
def test_of_an_accounts_file_all_is_told_and_nothing_twice(write: Write, csv: str, parts: list[str]) -> None:
    """A wrong header or row hides no other, and no row lacks what its header misspells."""
    write("accounts.csv", csv)
    text = "accounts_file = 'accounts.csv'\n[environments.e]\nbase_url = 'http://e'\n"
    problems = _problems(write("listener.toml", text), listens=True)
    for problem, part in zip(problems, parts, strict=True):
        assert part in problem


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            WHOLE.replace("[environments.e]\nbase_url = 'http://e'", "environments.e = 5"),
            "environments.e is no table; ",
        ),
        ("accounts = [3]\n", "accounts.0 is no table; write [[accounts]] with"),
        ("log = 5\n", "log is no table; write [log] with its settings below"),
    ],
)
def test_what_should_be_a_table(write: Write, text: str, part: str) -> None:
    """Is told how a table is opened; the accounts of an environment that is none are not missed."""
    (problem,) = _problems(write("listener.toml", text))
    assert part in problem


def test_an_account_lacks_and_has_a_name_that_is_taken(write: Write) -> None:
    """Two things are wrong with it, so both are told."""
    two = "[environments.f]\nbase_url = 'http://f'\n[[accounts]]\nenvironment = 'f'\nlogin = 'a'\n"
    problems = _problems(write("listener.toml", WHOLE + two))
    assert ["lacks password" in problem for problem in problems] == [True, False]
    assert ["the name a is taken" in problem for problem in problems] == [False, True]


def test_all_sources_are_told_when_one_cannot_be_read(write: Write, tmp_path: Path) -> None:
    """A file that is not TOML, a directory that is not there and a wrong flag are three lines; what the file
    would have said is not missed."""
    path = write("listener.toml", "[environments.prod]\nbase_url = 'http://x'\n[[[\n")
    problems = _problems(
        path,
        {"LISTENER_ENVIRONMENTS__PROD__AUTH": "bearer", "LISTENER_LIMITS": "{", "LISTENER_A_PASSWORD": "x"},
        overrides={"log.level": "x"},
        secrets_dir=tmp_path / "none",
        listens=True,
    )
    assert [problem.partition(": ")[0] for problem in problems] == [
        f"{path}:3",
        "--secrets-dir",
        "environment variable LISTENER_LIMITS",
        "flag --set log.level",
    ]


def test_nobody_could_be_asked_to_dial_where_that_is_allowed(write: Write) -> None:
    """A token for the API is missed at the line that lets somebody dial."""
    path = write("listener.toml", WHOLE + PBX + "dials = true\n")
    (problem,) = _problems(path)
    assert problem.startswith(f"{path}:10: ")
    assert load(path, {"api.token": SECRET}, environ={}).anybody_dials()


def test_of_a_broken_token_no_lack_is_told(write: Write) -> None:
    """A token that is of the wrong type is one problem, and not also a missing token."""
    (problem,) = _problems(write("listener.toml", "[operations]\nhost = '0.0.0.0'\ntoken = 5\n"))
    assert "operations.token: should be a valid string" in problem


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "listener.example.com"])
def test_listening_beyond_loopback_needs_a_token(host: str) -> None:
    """Whoever can reach the pages could read them: without a token any other address is refused."""
    (problem,) = _problems(None, {"LISTENER_OPERATIONS__HOST": host})
    assert "is not loopback" in problem
    assert "set operations.token_file" in problem
    environ = {"LISTENER_OPERATIONS__HOST": host, "LISTENER_OPERATIONS__TOKEN": SECRET}
    assert load(None, environ=environ).operations.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    """On loopback nothing more is asked for."""
    assert load(None, {"operations.host": host}, environ={}).operations.token is None


# ── Logging in ────────────────────────────────────────────────────────────────────────────────────────


def test_secrets_by_file_and_by_variable(write: Write) -> None:
    """Passwords, tokens and headers come from files beside the configuration or from variables, stripped."""
    write("secrets/one", f"{SECRET}\n")
    write("headers", "X-User: {login}\n\nX-Key: {password}\n")
    path = write(
        "listener.toml",
        """
        [environments.prod]
        base_url = "http://gws"
        [environments.b]
        base_url = "http://b"
        auth = "bearer"
        token_env = "TOKEN"
        [environments.c]
        base_url = "http://c"
        auth = "headers"
        headers_file = "headers"
        [[accounts]]
        environment = "prod"
        login = "one"
        password_file = "secrets/one"
        [[accounts]]
        environment = "prod"
        login = "two"
        password_env = "TWO"
        [[accounts]]
        environment = "b"
        login = "shared"
        [[accounts]]
        environment = "c"
        login = "me"
        password = "k"
        """,
    )
    loaded = load(path, environ={"TWO": SECRET, "TOKEN": "t2"})
    one, two, shared, me = loaded.accounts
    assert [account.password and account.password.get_secret_value() for account in (one, two)] == [
        SECRET
    ] * 2
    assert loaded.login_headers(shared) == {"Authorization": "Bearer t2"}
    assert loaded.login_headers(me) == {"X-User": "me", "X-Key": "k"}


@pytest.mark.parametrize(
    ("account", "part"),
    [
        ('login = "a"', "account a lacks password_file, password_env or password"),
        (
            'login = "a"\npassword = "x"\npassword_env = "Y"',
            "password and password_env are both given; keep one",
        ),
        ('login = "a"\npassword_env = "Y"', "password_env: the variable Y is not set"),
        ('login = "a"\npassword_env = "EMPTY"', "password_env: the variable EMPTY is empty"),
        ('login = "a"\npassword = ""', "password is empty"),
        ('login = "a"\npassword_file = "none"', "it cannot be read (No such file or directory)"),
        ('login = "a"\npassword_file = "empty"', "is empty"),
        ('login = "a"\npassword_file = "large"', "larger than 65536 bytes"),
        ('login = ""\npassword = "x"', "[[accounts]] login is empty; write the login at the GWS"),
    ],
)
def test_a_missing_secret_is_named(write: Write, account: str, part: str) -> None:
    """An account without exactly one usable secret is refused, at its line."""
    write("empty", "\n")
    write("large", "x" * 100_000)
    path = write(
        "listener.toml",
        f"[environments.e]\nbase_url = 'http://e'\n[[accounts]]\nenvironment = 'e'\n{account}",
    )
    (problem,) = _problems(path, {"EMPTY": ""})
    assert part in problem
    assert problem.startswith((f"{path}:3", f"{path}:5"))


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ('auth = "headers"', 'auth = "headers" needs headers, headers_file or headers_env'),
        ('auth = "headers"\nheaders_env = "H"', "line 2 of the given headers is no"),
        ('auth = "bearer"\ntoken_file = "none"', "token_file"),
        ('headers = { X-User = "{user}" }', "the header X-User has a {…} that is neither {login}"),
        ('ca_file = "none.pem"', "none.pem: it cannot be read"),
        ('ca_file = "listener.toml"', "listener.toml: no certificates can be read from it"),
        ('verify = "maybe"', "environments.e.verify must be true or false (false accepts any"),
    ],
)
def test_an_environment_that_cannot_log_in(write: Write, lines: str, part: str) -> None:
    """What an environment needs for its way of logging in is asked for where the environment stands."""
    path = write("listener.toml", f"[environments.e]\nbase_url = 'http://e'\n{lines}\n")
    (problem,) = _problems(path, {"H": f"A: b\n{SECRET}"})
    assert problem.startswith((f"{path}:1: ", f"{path}:3: "))
    assert part in problem


def test_an_address_holds_no_password(write: Write) -> None:
    """A user and password in the address would be shown wherever the address is."""
    path = write("listener.toml", BASIC.replace("://", f"://me:{SECRET}@"))
    (problem,) = _problems(path)
    assert "environments.prod.base_url: it must hold no user and no password" in problem


def test_an_unknown_environment_is_named(write: Write) -> None:
    """An account of an environment that is not there gets the nearest name."""
    path = write("listener.toml", BASIC + "[[accounts]]\nenvironment = 'prd'\nlogin = 'b'\npassword = 'x'\n")
    (problem,) = _problems(path)
    assert problem == f'{path}:9: account b: there is no [environments."prd"]; did you mean "prod"?'


# ── The accounts file ─────────────────────────────────────────────────────────────────────────────────

ENVIRONMENT = "accounts_file = 'accounts.csv'\n[environments.prod]\nbase_url = 'http://gws'\n"


def test_an_accounts_file_of_thousands(write: Write) -> None:
    """Thousands of rows become accounts, beside those of the configuration; empty values mean not given."""
    rows = "".join(f"agent{number},prod,pw{number},,tenant{number % 3}\n" for number in range(5000))
    write("accounts.csv", "login,environment,password,start_contact_center_session,tenant\n" + rows + "\n")
    more = "[[accounts]]\nenvironment = 'prod'\nlogin = 'b'\npassword = 'x'\n"
    loaded = load(write("listener.toml", ENVIRONMENT + more), environ={})
    assert len(loaded.accounts) == 5001
    last = loaded.accounts[-1]
    assert (last.login, last.tenant) == ("agent4999", "tenant1")
    assert last.password is not None
    assert last.password.get_secret_value() == "pw4999"


def test_paths_in_an_accounts_file_are_relative_to_it(write: Write) -> None:
    """A password file of a row is looked for beside the accounts file, wherever the configuration is."""
    write("lists/pw", SECRET)
    write("lists/accounts.csv", "environment,login,password_file\nprod,a,pw\n")
    path = write("listener.toml", ENVIRONMENT.replace("accounts.csv", "lists/accounts.csv"))
    (account,) = load(path, environ={}).accounts
    assert account.password is not None
    assert account.password.get_secret_value() == SECRET


def test_wrong_rows_are_named_by_file_and_line(write: Write) -> None:
    """Each bad row is named by its line, quoted line breaks counted; good rows are no problem."""
    csv = write(
        "accounts.csv",
        f"""\
        environment,login,password,start_contact_center_session
        prod,good,{SECRET},
        prod,short

        prod,,{SECRET},
        prod,flag,{SECRET},maybe
        prd,elsewhere,{SECRET},
        prod,"quoted
        login",{SECRET},
        prod,good,{SECRET},
        prod,none,,
        """,
    )
    path = write("listener.toml", ENVIRONMENT)
    problems = [problem.removeprefix(f"{csv}:") for problem in _problems(path)]
    assert [problem.partition(":")[0] for problem in problems] == ["3", "5", "6", "7", "10", "11"]
    for problem, part in zip(
        problems,
        [
            "2 values for 4 columns",
            "this row lacks login",
            ": start_contact_center_session must be true or false (true LOGS",
            'no [environments."prd"]; did you mean "prod"?',
            f"good is already an account of prod, at {csv}:2",
            "account none lacks password_file",
        ],
        strict=True,
    ):
        assert part in problem


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("environment,lgoin\n", 1, 'there is no column "lgoin"; did you mean "login"?'),
        ("login,environment,login\n", 1, 'the column "login" is there twice; keep one'),
        ("login,tenant\n", 1, "the header row lacks the column environment"),
        ("", 1, "the header row lacks the column environment"),
        ('environment,login\nprod,"a\n', 2, "this is not CSV"),
    ],
)
def test_an_accounts_file_that_is_none(write: Write, text: str, line: int, part: str) -> None:
    """A header that cannot be, and a file that is no CSV, are refused with the line."""
    csv = write("accounts.csv", text)
    (problem,) = _problems(write("listener.toml", ENVIRONMENT))
    assert problem.startswith(f"{csv}:{line}: ")
    assert part in problem


def test_thousands_of_problems_stay_readable(write: Write) -> None:
    """Of very many problems the first are named and the rest is counted."""
    write("accounts.csv", "environment,login\n" + "prod\n" * 5000)
    problems = _problems(write("listener.toml", ENVIRONMENT))
    assert len(problems) == configuration.PROBLEMS_MAX + 1
    assert problems[-1] == f"and {5000 - configuration.PROBLEMS_MAX} problems more"


def test_two_environments_may_share_a_login_but_not_a_name(write: Write) -> None:
    """The same login at two places is two accounts, which then need names of their own."""
    text = BASIC + "[environments.two]\nbase_url = 'http://two'\n"
    second = "[[accounts]]\nenvironment = 'two'\nlogin = 'agent1'\npassword = 'x'\n"
    (problem,) = _problems(write("listener.toml", text + second))
    assert "the name agent1 is taken at" in problem
    loaded = load(write("listener.toml", text + second + "name = 'agent1 at two'\n"), environ={})
    assert [account.name for account in loaded.accounts] == ["agent1", "agent1 at two"]


# ── Which file ────────────────────────────────────────────────────────────────────────────────────────


def test_which_file_is_read(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """-c, else LISTENER_CONFIG, else ./listener.toml, else the demo's, else none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configuration, "CONFIG_FILES", (Path("listener.toml"), configuration.DEMO_CONFIG))
    given, named = Path("given.toml"), {"LISTENER_CONFIG": "named.toml"}
    assert find(None, {}) is None
    write(".demo/listener.toml", "")
    assert find(None, {}) == Path(".demo/listener.toml")
    write("listener.toml", "")
    assert find(None, {}) == Path("listener.toml")
    assert find(None, named) == Path("named.toml")
    assert find(given, named) == given


# ── Dials ─────────────────────────────────────────────────────────────────────────────────────────────

PBXS = f"""
[noojee.office]
base_url = "https://noojee.example.com/"
api_key = "{SECRET}"
extensions = {{ 101 = "ann", 102 = "desk" }}
tenant = "north"
[click2dial.c2d]
base_url = "http://pbx.example.com:8300"
redis_url = "redis://:{SECRET}@pbx.example.com/0"
webhook_token = "{SECRET}"
extensions = {{ 201 = "bob" }}
"""


def test_secrets_of_a_pbx_are_never_shown(write: Write) -> None:
    """Neither an API key, nor a Redis password, nor a webhook token, nor the API's own."""
    loaded = load(write("listener.toml", BASIC + PBXS + f'[api]\ntoken = "{SECRET}"\n'), environ={})
    for told in (repr(loaded), str(loaded), loaded.model_dump_json()):
        assert SECRET not in told
    assert loaded.api.token is not None
    key = loaded.noojee["office"].api_key
    assert key is not None
    assert key.get_secret_value() == SECRET


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ('[noojee.a]\nbase_url = "https://a"\n', "[noojee.a] lacks api_key_file"),
        ('[noojee.a]\nbase_url = "https://a"\napi_key_env = "GONE"\n', "the variable GONE is not set"),
        ('[noojee.a]\nbase_url = "http://a"\napi_key = "k"\n', "in clear; write https://"),
        ('[noojee.a]\nbase_url = "a"\napi_key = "k"\n', "noojee.a.base_url: it must begin with http://"),
        (
            '[noojee.a]\nbase_url = "https://a"\napi_key = "k"\nextensions = { "SIP/1" = "x" }\n',
            "without technology",
        ),
        ('[noojee.a]\nbase_url = "https://a"\napi_key = "k"\ndails = true\n', 'did you mean "dials"?'),
        ('[click2dial.a]\nbase_url = "http://a"\nversion = "2"\n', "click2dial.a.version"),
        (
            '[click2dial.a]\nbase_url = "http://a"\nextensions = { 1 = "agent1" }\n',
            "the account agent1 is taken by [[accounts]] agent1",
        ),
        ('[click2dial.a]\nbase_url = "http://a"\nredis_url = "http://b"\n', "redis://, rediss:// or unix://"),
        ('[click2dial.a]\nbase_url = "http://a"\ndials = true\n[api]\ntoken = "t"\n', "hears of no end"),
        ('[click2dial."a b"]\nbase_url = "http://a"\n', "part of addresses"),
        ('[click2dial.prod]\nbase_url = "http://a"\n', "also an [environments.prod]"),
        (
            '[noojee.a]\nbase_url = "https://a"\napi_key = "k"\n[click2dial.a]\nbase_url = "http://a"\n',
            "also a [noojee.a]",
        ),
        ('[noojee.a]\nbase_url = "https://a"\napi_key = "k"\ndials = true\n', "[api] has no token"),
        ('[api]\ntoken_file = "gone"\n', "it cannot be read"),
        ("[limits]\ndial_s = 0\n", "limits.dial_s"),
    ],
)
def test_what_is_wrong_about_dials_is_named(write: Write, more: str, part: str) -> None:
    """Each problem has its file, its line and its cure."""
    path = write("listener.toml", BASIC + more)
    (told,) = _problems(path)
    assert re.match(rf"{re.escape(str(path))}:\d+: ", told), told
    assert part in told
