"""The check of what tests leave behind sees each kind of it: a run of tests that leave something is red."""

import re
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from listener.store.embedded import Embedded
from tests.support.database import new_database

ROOT = Path(__file__).parents[1]
RUN_s = 50.0

LEAKS = {
    "task": (
        "async def test_{name}():\n    asyncio.get_running_loop().create_task(asyncio.Event().wait())\n",
        "task Task-",
    ),
    "thread": (
        "def test_{name}():\n    threading.Thread(target=OVER.wait, name='idler', daemon=True).start()\n",
        "thread idler",
    ),
    "child": (
        "def test_{name}():\n    KEPT.append(subprocess.Popen(['sleep', '30']))\n",
        "child process",
    ),
    "unwaited": (
        "def test_{name}():\n    if os.fork() == 0:\n        os._exit(0)\n",
        "child process",
    ),
    "socket": (
        "def test_{name}():\n    KEPT.append(socket.create_server(('127.0.0.1', 0)))\n",
        "socket ",
    ),
    "file": ("def test_{name}():\n    KEPT.append(open(__file__))\n", "descriptor "),
    "transport": (
        (
            "async def test_{name}():\n"
            "    server = await asyncio.start_server(lambda r, w: None, '127.0.0.1', 0)\n"
            "    KEPT.append(await asyncio.open_connection(*server.sockets[0].getsockname()))\n"
            "    server.close()\n"
        ),
        "socket ",
    ),
    "session": ("async def test_{name}():\n    KEPT.append(aiohttp.ClientSession())\n", "not closed: "),
    "connector": ("async def test_{name}():\n    KEPT.append(aiohttp.TCPConnector())\n", "not closed: "),
    "collected_session": (
        "async def test_{name}():\n    aiohttp.ClientSession()\n",
        "ResourceWarning: Unclosed client session",
    ),
    "collected_socket": ("def test_{name}():\n    socket.socket()\n", "ResourceWarning: unclosed <socket"),
    "collected_in_a_cycle": (
        "def test_{name}():\n    ring = [socket.socket()]\n    ring.append(ring)\n",
        "ResourceWarning: unclosed <socket",
    ),
    "coroutine": ("async def test_{name}():\n    asyncio.sleep(0)\n", "was never awaited"),
    "coroutine_of_nobody": ("def test_{name}():\n    asyncio.sleep(0)\n", "was never awaited"),
    "failure_of_a_task": (
        (
            "async def test_{name}():\n"
            "    asyncio.get_running_loop().create_task(fails())\n"
            "    await asyncio.sleep(0)\n"
        ),
        "asyncio reported: Task exception was never retrieved",
    ),
    "failure_of_a_callback": (
        (
            "async def test_{name}():\n"
            "    asyncio.get_running_loop().call_soon(lambda: 1 / 0)\n"
            "    await asyncio.sleep(0)\n"
        ),
        "asyncio reported: Exception in callback",
    ),
    "exception_in_a_finalizer": (
        "def test_{name}():\n    type('Broken', (), {{'__del__': lambda self: 1 / 0}})()\n",
        "ZeroDivisionError",
    ),
    "exception_in_a_thread": (
        (
            "def test_{name}():\n"
            "    thread = threading.Thread(target=lambda: 1 / 0)\n    thread.start()\n    thread.join()\n"
        ),
        "ZeroDivisionError",
    ),
    "a_fixture_that_lasts": (
        (
            "def test_{name}(request):\n"
            "    request.getfixturevalue('lasting')\n"
            "    KEPT.append(socket.socket())\n"
        ),
        "socket ",
    ),
    "nothing_but_a_fixture_that_lasts": (
        "def test_{name}(request):\n    request.getfixturevalue('lasting_too')\n",
        "",
    ),
    "nothing": (
        (
            "async def test_{name}():\n"
            "    server = await asyncio.start_server(lambda r, w: w.close(), '127.0.0.1', 0)\n"
            "    async with server, aiohttp.ClientSession():\n"
            "        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())\n"
            "        await reader.read()\n"
            "        writer.close()\n"
            "    await asyncio.to_thread(subprocess.run, ['true'])\n"
        ),
        "",
    ),
}
"""What a test leaves, and what must be said of it."""

HEAD = """
import asyncio, os, socket, subprocess, threading
import aiohttp
import pytest

KEPT = []

@pytest.fixture(scope="session")
def lasting():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server

@pytest.fixture(scope="session")
def lasting_too():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server

OVER = threading.Event()

async def fails():
    raise LookupError("nobody asks")

def teardown_module():
    for each in KEPT:
        if isinstance(each, subprocess.Popen):
            each.kill()
            each.wait()

"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run of the leaking tests, under this project's own settings, says of each."""
    place = tmp_path_factory.mktemp("leaking")
    (place / "conftest.py").write_text(
        "from tests.conftest import (\n"
        "    _tasks_end, no_task_is_left_behind, nothing_is_left_behind, pytest_configure,\n"
        "    pytest_runtest_teardown)\n"
        "from tests.support import leftovers\n"
        "leftovers.SETTLE_s = 0.1\n"
    )
    tests = "\n".join(text.format(name=name) for name, (text, _) in LEAKS.items())
    (place / "test_leaking.py").write_text(HEAD + tests)
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(place.parent), "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--no-header", "-rN", str(place)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RUN_s,
        check=False,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    sections = re.split(r"^_+ (?:ERROR at \w+ of )?test_(\w+) _+$", run.stdout, flags=re.MULTILINE)
    found = dict.fromkeys(LEAKS, "")
    for name, text in zip(sections[1::2], sections[2::2], strict=True):
        found[name] += text
    return found


@pytest.mark.parametrize("name", LEAKS)
def test_what_is_left_behind_fails_the_test_that_left_it(said: dict[str, str], name: str) -> None:
    """Each by its own name, and a test that leaves nothing by none."""
    _, words = LEAKS[name]
    if words:
        assert words in said[name], said[name]
    else:
        assert said[name] == ""


async def test_a_connection_that_is_left_open_fails_its_test(postgres: Embedded, template: str) -> None:
    """The database's end sees it: with its state and what it asked last."""
    own = new_database(postgres, template)
    kept = await asyncpg.connect(await own.__aenter__())
    await kept.fetchval("SELECT 'kept'")
    with pytest.raises(pytest.fail.Exception, match=r"connection \d+ \(idle\): SELECT 'kept'"):
        await own.__aexit__(None, None, None)
    kept.terminate()
