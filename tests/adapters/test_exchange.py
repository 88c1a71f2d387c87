"""One exchange with a party: what is hidden, what is read. What it does in trouble is in test_dialling.py."""

import base64
import tomllib
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from listener.adapters.exchange import (
    CODE_MAX,
    HIDDEN,
    SAID_BYTES_MAX,
    SAID_CHARS_MAX,
    SECRET_CHARS_MIN,
    Answer,
    NoAnswer,
    Secrets,
    Trouble,
    challenge,
    exchange,
)
from tests.support.party import party, says

ROOT = Path(__file__).parents[2]
NONE = Secrets([])


def answer(body: bytes, trouble: Trouble | None = None) -> Answer:
    """An answer with this body."""
    return Answer(status=200, headers={"X-Token": "t0ken"}, body=body, said="so", trouble=trouble)


# ── Secrets ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    [
        'GET /dial?apiKey=a/b+c"d',
        "GET /dial?apiKey=a%2Fb%2Bc%22d",
        "GET /dial?apiKey=a/b%2Bc%22d",
        '{"key": "a/b+c\\"d"}',
        'cut: a/b+c"',
        "cut: a/b+",
    ],
)
def test_a_secret_is_hidden_in_each_spelling(text: str) -> None:
    """As it is, as in a URL, as in JSON, and where the text ends within it."""
    hidden = Secrets(['a/b+c"d']).hide(text)
    assert HIDDEN in hidden
    assert "b" not in hidden.replace("cut", "").replace("dial", "")


@pytest.mark.parametrize("said", ["agent:swordfish", "swordfish", "{basic}", "Basic {basic}"])
def test_the_parts_of_a_login_are_secrets(said: str) -> None:
    """Basic's password stands in the header in base64, and a party may say it plainly."""
    basic = base64.b64encode(b"agent:swordfish").decode()
    assert Secrets([f"Basic {basic}"]).hide(said.format(basic=basic)) == HIDDEN


def test_a_bearer_token_is_a_secret_without_its_scheme() -> None:
    """What follows the scheme is the token; a malformed Basic is hidden as it is."""
    assert Secrets(["Bearer to.ken"]).hide("got to.ken!") == f"got {HIDDEN}!"
    assert Secrets(["Basic not-base64!"]).hide("got not-base64!") == f"got {HIDDEN}"


def test_what_is_short_is_no_secret() -> None:
    """A header `X-Gateway: 7` would hide every 7."""
    assert Secrets(["7", "x" * (SECRET_CHARS_MIN - 1)]).hide("HTTP 777 xxx") == "HTTP 777 xxx"


def test_secrets_do_not_show_themselves() -> None:
    """Nor what is in them."""
    assert "swordfish" not in repr(Secrets(["swordfish"]))


_SECRET = st.text(st.characters(exclude_characters=HIDDEN), min_size=SECRET_CHARS_MIN, max_size=20)


@given(_SECRET, st.text(max_size=50), st.text(max_size=50))
def test_no_secret_is_left_in_any_line(secret: str, before: str, after: str) -> None:
    """Whatever stands around it."""
    assert secret not in Secrets([secret]).hide(before + secret + after)


@given(st.text(max_size=300))
def test_a_line_fits_everywhere(text: str) -> None:
    """One line, bounded, printable, and PostgreSQL takes it."""
    line = NONE.one_line(text)
    assert line.isprintable()
    assert len(line) <= SAID_CHARS_MAX
    assert line.encode().decode() == line


def test_a_line_is_cut_after_its_secrets_are_hidden() -> None:
    """A cut within a secret would show its beginning."""
    secret = "swordfish" * 3
    for before in range(SAID_CHARS_MAX - 30, SAID_CHARS_MAX + 1):
        assert "sword" not in Secrets([secret]).one_line("x" * before + secret)
    assert "sword" not in Secrets([secret]).one_line("  " * 2_000 + "x" * (SAID_BYTES_MAX - 4_008) + secret)


# ── Answers ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"Code": 0}', 0),
        (b'{"Code": -1}', -1),
        (b'{"Code": %d}' % CODE_MAX, CODE_MAX),
        (b'{"Code": %d}' % (CODE_MAX + 1), None),
        (b'{"Code": true}', None),
        (b'{"Code": 1.5}', None),
        (b'{"Code": "0"}', None),
        (b'{"code": 0}', None),
        (b"[]", None),
        (b"", None),
        (b"\xff", None),
        (b"[" * 100_000, None),
    ],
)
def test_whole_numbers_are_read(body: bytes, value: int | None) -> None:
    """Every code is one; nothing else is."""
    assert answer(body).integer("Code") == value


def test_an_answer_that_is_not_whole_has_no_fields() -> None:
    """It may have said more."""
    assert answer(b'{"Code": 0}', Trouble.BROKEN).json() == {}
    assert answer(b'{"Code": 0}').json() == {"Code": 0}


def test_an_answer_does_not_show_what_it_holds() -> None:
    """Its headers may hold a token, its body anything."""
    assert repr(answer(b'{"password": "swordfish"}')) == "Answer(HTTP 200 so)"


async def test_an_answer_as_it_came() -> None:
    """Status, headers, body, and what it said in one line."""
    async with party(says(418, "short and\nstout", **{"X-Token": "t0ken"})) as there:
        got = await exchange("GET", URL(there.url), headers={}, secrets=NONE)
    assert isinstance(got, Answer)
    assert (got.status, got.body, got.said) == (418, b"short and\nstout", "short and stout")
    assert (got.headers["x-token"], got.trouble, got.location) == ("t0ken", None, "")


async def test_cookies_are_kept_by_who_brings_a_jar() -> None:
    """Nobody else has a session."""
    sent: list[str | None] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        sent.append(request.headers.get("Cookie"))
        return web.Response(headers={"Set-Cookie": "a=b"})

    async with party(handler) as there:
        jar = aiohttp.CookieJar(unsafe=True)  # also for hosts that are IP addresses
        for kept in (None, None, jar, jar):
            await exchange("GET", URL(there.url), headers={}, secrets=NONE, jar=kept)
    assert sent == [None, None, None, "a=b"]


@pytest.mark.parametrize("url", ["http://a..b/", f"http://{'a' * 70}.example/", "http:///x"])
async def test_a_host_that_cannot_be(url: str) -> None:
    """It is no answer, and nothing was sent."""
    got = await exchange("GET", URL(url, encoded=True), headers={}, secrets=NONE)
    assert isinstance(got, NoAnswer)
    assert not got.sent
    assert got.why


async def test_a_header_that_cannot_be() -> None:
    """It is no answer, and the server sees no request."""
    async with party(says(200, "")) as there:
        got = await exchange("POST", URL(there.url), headers={"X": "a\r\nb: c"}, secrets=NONE)
        assert there.seen == []
    assert isinstance(got, NoAnswer)


def test_every_adapter_is_blind_to_the_others() -> None:
    """The import contract names the parties one by one: a new one must be added to it."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (blind,) = [each for each in contracts["contracts"] if each["type"] == "independence"]
    parties = {path.stem for path in (ROOT / "listener" / "adapters").glob("[!_]*.py")} - {"exchange"}
    assert set(blind["modules"]) == {f"listener.adapters.{party}" for party in parties}


# ── Who asks us ───────────────────────────────────────────────────────────────────────────────────────

NOTHING_SHOWN = 'Bearer realm="listener"'
WRONG = 'Bearer realm="listener", error="invalid_token"'


@pytest.mark.parametrize(
    ("authorization", "refusal"),
    [
        ("Bearer to.ken=", None),
        ("bEARER to.ken=", None),
        ("Bearer    to.ken=", None),
        ("to.ken=", NOTHING_SHOWN),
        ("", NOTHING_SHOWN),
        ("Basic to.ken=", NOTHING_SHOWN),
        ("Bearer\tto.ken=", NOTHING_SHOWN),
        ("Bearer", NOTHING_SHOWN),
        ("Bearer ", NOTHING_SHOWN),
        ("Bearer to.ken", WRONG),
        ("Bearer TO.KEN=", WRONG),
        ("Bearer to.ken= more", WRONG),
        ("Bearer t\xf6ken", WRONG),
        ("Bearer \ud800\udcff", WRONG),
        ("\ud800 to.ken=", NOTHING_SHOWN),
    ],
)
def test_a_token_is_shown_as_rfc_6750_says(authorization: str, refusal: str | None) -> None:
    """The scheme in any case, blanks, the token as it is; all else is refused and breaks nothing."""
    assert challenge("to.ken=", authorization) == refusal


@pytest.mark.parametrize("token", ["t\xf6ken", "\udcff\ud800"])
def test_a_token_of_any_letters_can_be_shown(token: str) -> None:
    """A variable of the environment may hold any bytes, and a header too."""
    assert challenge(token, f"Bearer {token}") is None
    assert challenge(token, f"Bearer {token}x") == WRONG


def test_a_token_beside_the_header() -> None:
    """Counts where the header is of no such scheme, which else decides alone."""
    assert challenge("t", "", "t") is None
    assert challenge("t", "Basic x", "t") is None
    assert challenge("t", "", "x") == WRONG
    assert challenge("t", "Bearer x", "t") == WRONG


def test_an_empty_token_is_shown_by_nobody() -> None:
    """It would be by everybody."""
    assert challenge("", "Bearer ") is not None
    assert challenge("", "", "") is not None
