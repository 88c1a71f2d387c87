"""What was heard while PostgreSQL was away, on disk: appended, fsynced, checksummed, bounded.

It decides how a delivery lies in a file, what a damaged file still yields, and when a file may go. It refuses
to know when anything is spooled or drained (`listener.pipeline` does), and it is no journal: nothing reads it
but the drain and `listener spool`. It holds personal data as it was heard, so the directory is 0700 and its
files are 0600. No file is touched before the first append, unless a run before left a directory.

**Format**, version 1, numbers big-endian. A segment is a file `000000000001.spool`: twice the same header
(`LSNSPOL` and a byte of version, the segment's mark, CRC-32), then records. A record is the mark, the length
of its payload, account, number of notifications, when the first was received (microseconds since 1970),
CRC-32 of these and the payload, and the payload: MessagePack of the delivery's `Heard`. The mark is random
for each segment. So the next record is found when a length is damaged, and no message that somebody sends us
can pass for a record. CRC-32 is against damage, not against people.

**Recovery.** Segments are only ever appended to, by the process that began them. What a crash cut short at
the end of the last one was never reported as written: it is cut off. Anything else that is no whole record is
damage: it is copied into a `.damaged` file beside its segment, counted, and the rest goes on. What may be
missing with it is told (`Spool.lost`), and until then its segment stays.

Whose a damaged stretch was is believed only where it is one record whose header and payload name the same
account; else it may have been anybody's. The records of an account lie in the order in which they were
received, so what is missing was received between the one before the damage and the one after it. Behind the
last one it was received before its segment was last written to, by the clock of the file system.

Every method blocks, and may be called from any thread.
"""

import contextlib
import fcntl
import os
import secrets
import struct
import threading
import zlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path

import msgspec
from msgspec import Struct

from listener.core.calls import Heard, Missing
from listener.errors import SpoolFull, StoreError

BYTES_MAX = 2**30
"""On disk, without what was set aside. When full, `append` raises SpoolFull: nothing is dropped."""

SEGMENT_BYTES_MAX = 32 * 2**20
"""A segment that would grow beyond it is followed by the next; one larger append has a segment of its own."""

DELIVERIES_MAX = 500_000
"""Deliveries in the spool: who waits for each is remembered, in some 400 bytes of memory. Full beyond it."""

MISSING_MAX = 10_000
"""Stretches in which something may be missing: of more, each account's become one, which is longer."""

_MAGIC = b"LSNSPOL\x01"
_HEADER = struct.Struct(">8s8sI")
_RECORD = struct.Struct(">8sIqIqI")
_FIELDS = struct.Struct(">IqIq")
_BEGIN = 2 * _HEADER.size
_MARK_BYTES = 8
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Heard]).decode
_ACCOUNT = _encode("account")

Place = tuple[int, int, int]
"""Where a delivery lies: segment, offset, length of the record."""


class Spooled(Struct, frozen=True, gc=False):
    """A delivery that an earlier run left: to be drained, in this order."""

    place: Place
    account: int
    notifications: int
    received_at: datetime
    until: datetime
    """All of it was received by then."""


class Lost(Struct, frozen=True):
    """What an earlier run left, and nobody can read any more."""

    places: tuple[Place, ...] = ()
    """To be released when it is known of all that is missing."""
    missing: tuple[Missing, ...] = ()


class SegmentReport(Struct, frozen=True):
    """What one segment holds."""

    name: str
    size_bytes: int
    records: int
    notifications: int
    oldest: datetime | None
    newest: datetime | None
    damaged: int
    """Stretches that are no whole record."""
    torn_bytes: int
    """At its end: a record that was being written, or had been when the process died."""


class SpoolReport(Struct, frozen=True):
    """What lies in a spool directory, for people."""

    directory: str
    exists: bool
    in_use: bool
    """A listener has it open."""
    segments: tuple[SegmentReport, ...]
    records: int
    notifications: int
    size_bytes: int
    oldest: datetime | None
    newest: datetime | None
    accounts: dict[int, int]
    """Notifications by the account's id in the database."""
    damaged: int
    """Stretches in the segments that are no whole record."""
    set_aside: dict[str, int]
    """The `.damaged` files and their bytes."""


class _Segment(Struct):
    path: Path
    mark: bytes
    size_bytes: int
    oldest: datetime | None = None
    live: int = 0
    """Records, and damaged stretches, that are not released."""
    keep: bool = False
    """Something in it could not be set aside: it stays."""


class _Scan(Struct):
    mark: bytes = b""
    found: list[tuple[int, int, int, int, int]] = []
    """Offset, length, account, notifications and microseconds of each record."""
    damaged: list[tuple[int, int]] = []
    torn_bytes: int = 0


class _Found(Struct, frozen=True):
    """A record, or a damaged stretch, of an earlier run; moments are microseconds since 1970."""

    account: int | None
    at: int | None
    """When it was received."""
    written_at: int | None = None
    """Of a stretch: it had been received by then. None for a record that is whole."""


class Spool:
    """The spool of one directory, for one process. Made by `open`; `close` it, which removes nothing."""

    def __init__(
        self,
        directory: Path,
        *,
        bytes_max: int = BYTES_MAX,
        segment_bytes_max: int = SEGMENT_BYTES_MAX,
        deliveries_max: int = DELIVERIES_MAX,
    ) -> None:
        self.directory = directory
        self._found: list[Spooled] = []
        self._unreadable = Lost()
        self.size_bytes = 0
        self.damaged = 0
        """Stretches set aside since `open`."""
        self.torn_bytes = 0
        """Cut off by `open`: what was being written when the process before died."""
        self._bytes_max = bytes_max
        self._segment_bytes_max = segment_bytes_max
        self._deliveries_max = deliveries_max
        self._deliveries = 0
        self._segments: dict[int, _Segment] = {}
        self._next = 1
        self._current: int | None = None
        self._file = -1
        self._held = -1
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        bytes_max: int = BYTES_MAX,
        segment_bytes_max: int = SEGMENT_BYTES_MAX,
        deliveries_max: int = DELIVERIES_MAX,
    ) -> "Spool":
        """Recover what an earlier run left in the directory; where there is none, nothing is made yet.

        Raises StoreError when another process has it open, when others may read it, or when it was written
        by another version.
        """
        spool = cls(
            directory,
            bytes_max=bytes_max,
            segment_bytes_max=segment_bytes_max,
            deliveries_max=deliveries_max,
        )
        if directory.exists():
            try:
                spool._hold()
                spool._recover()
            except OSError as error:
                spool.close()
                raise StoreError(
                    f"The spool in {directory} cannot be read ({error.strerror}): give it to the listener's "
                    "user, or name another directory with store.spool_dir."
                ) from None
            except BaseException:
                spool.close()
                raise
        return spool

    def close(self) -> None:
        """Let go of the directory; what is in it stays for the next run."""
        with self._lock:
            self._end_segment()
            if self._held >= 0:
                os.close(self._held)
                self._held = -1

    @property
    def oldest(self) -> datetime | None:
        """When the oldest message was received of the segments that are there; None when there is none."""
        with self._lock:
            return min((each.oldest for each in self._segments.values() if each.oldest), default=None)

    def left(self) -> list[Spooled]:
        """What an earlier run left, in the order in which it was heard: read, commit and release it. The list
        is given once."""
        found, self._found = self._found, []
        return found

    def lost(self) -> Lost:
        """What an earlier run left and is damaged: to be told before anything of `left` is committed, and
        then released. It is given once."""
        lost, self._unreadable = self._unreadable, Lost()
        return lost

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────

    def append(self, deliveries: Sequence[Sequence[Heard]]) -> list[Place]:
        """Write deliveries, each of one account, and wait until they are on disk; says where each lies.

        Raises SpoolFull, with cause and cure, when there is no room or the disk refuses: then none of them
        is written, and the same may be tried again later.
        """
        with self._lock:
            try:
                if self._held < 0:
                    self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                    self._hold()
                return self._append(deliveries)
            except OSError as error:
                raise SpoolFull(
                    f"The spool in {self.directory} cannot be written ({error.strerror}): make room or "
                    "mend the disk, or name another directory with store.spool_dir; it is tried again."
                ) from None

    def _append(self, deliveries: Sequence[Sequence[Heard]]) -> list[Place]:
        payloads = [_encode(heard) for heard in deliveries]
        length = sum(map(len, payloads)) + len(payloads) * _RECORD.size
        if (
            self.size_bytes + length + _BEGIN > self._bytes_max
            or self._deliveries + len(deliveries) > self._deliveries_max
        ):
            raise SpoolFull(
                f"The spool in {self.directory} is full ({self.size_bytes} bytes, {self._deliveries} "
                "deliveries): bring PostgreSQL back, or raise limits.spool_bytes_max."
            )
        number, segment = self._writable(length)
        places: list[Place] = []
        records: list[bytes] = []
        at = segment.size_bytes
        for heard, payload in zip(deliveries, payloads, strict=True):
            record = _record(segment.mark, heard, payload)
            places.append((number, at, len(record)))
            records.append(record)
            at += len(record)
        try:
            _write_all(self._file, b"".join(records))
            os.fsync(self._file)
        except OSError:
            # After a failed fsync nobody knows what is on disk: this segment is not written to any more.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, segment.size_bytes)
            self._end_segment()
            if not segment.live:
                self._remove(number)
            raise
        segment.size_bytes += length
        segment.live += len(places)
        segment.oldest = segment.oldest or deliveries[0][0].received_at
        self.size_bytes += length
        self._deliveries += len(places)
        return places

    def _writable(self, length: int) -> tuple[int, _Segment]:
        """The segment to append to, open; a new one when there is none or the last one is long enough."""
        if self._current is not None:
            segment = self._segments[self._current]
            if segment.size_bytes + length <= self._segment_bytes_max or not segment.live:
                return self._current, segment
            self._end_segment()
        number = self._next
        path = self.directory / f"{number:012d}.spool"
        mark = secrets.token_bytes(_MARK_BYTES)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_APPEND, 0o600)
        try:
            _write_all(file, 2 * _header(mark))
            os.fsync(file)
            _fsync_directory(self.directory)
        except OSError:
            os.close(file)
            path.unlink(missing_ok=True)
            raise
        self._next += 1
        self._current, self._file = number, file
        self._segments[number] = _Segment(path, mark, _BEGIN)
        self.size_bytes += _BEGIN
        return number, self._segments[number]

    def _end_segment(self) -> None:
        if self._current is not None:
            os.close(self._file)
            self._current, self._file = None, -1

    # ── draining ──────────────────────────────────────────────────────────────────────────────────────

    def read(self, places: Sequence[Place]) -> list[list[Heard] | None]:
        """Give back the deliveries at these places; None for one that is damaged, and now set aside."""
        heard: list[list[Heard] | None] = []
        for number, group in groupby(places, key=lambda place: place[0]):
            segment = self._segments[number]
            try:
                file = os.open(segment.path, os.O_RDONLY | os.O_NOFOLLOW)
            except OSError:
                heard += [self._lost(segment, place, b"") for place in group]
                continue
            try:
                heard += [self._read(segment, file, place) for place in group]
            finally:
                os.close(file)
        return heard

    def _read(self, segment: _Segment, file: int, place: Place) -> list[Heard] | None:
        _, offset, length = place
        try:
            record = os.pread(file, length, offset)
        except OSError:
            return self._lost(segment, place, b"")
        if _whole(record, 0, segment.mark) != length:
            return self._lost(segment, place, record)
        try:
            return _decode(memoryview(record)[_RECORD.size :])
        except msgspec.MsgspecError:
            return self._lost(segment, place, record)

    def _lost(self, segment: _Segment, place: Place, record: bytes) -> list[Heard] | None:
        with self._lock:
            self._set_aside(segment, place[1], record)
        return None

    def _set_aside(self, segment: _Segment, offset: int, content: bytes) -> None:
        """Keep damaged bytes in a file named by their place: doing it twice is doing it once."""
        self.damaged += 1
        path = segment.path.with_name(f"{segment.path.stem}-{offset}.damaged")
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            try:
                _write_all(file, content)
                os.fsync(file)
            finally:
                os.close(file)
        except OSError:
            segment.keep = True
        segment.keep |= not content

    def release(self, places: Iterable[Place]) -> None:
        """These deliveries are committed, or told to be lost. A segment of which nothing is needed any more
        goes."""
        with self._lock:
            for number, _, _ in places:
                segment = self._segments[number]
                segment.live -= 1
                self._deliveries -= 1
                if not segment.live:
                    if number == self._current:
                        self._end_segment()
                    self._remove(number)

    def _remove(self, number: int) -> None:
        segment = self._segments.pop(number)
        self.size_bytes -= segment.size_bytes
        if not segment.keep:
            # Should it stay, it is drained once more at the next start, and the journal knows all of it.
            with contextlib.suppress(OSError):
                segment.path.unlink()

    # ── recovery ──────────────────────────────────────────────────────────────────────────────────────

    def _hold(self) -> None:
        """Be the directory's only process, until `close`."""
        if self.directory.stat().st_mode & 0o077:
            raise SpoolFull(
                f"Others may look into the spool in {self.directory}, which holds personal data: "
                f"`chmod 700 {self.directory}`, or name another directory with store.spool_dir."
            )
        file = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise SpoolFull(
                f"Another listener uses the spool in {self.directory}: stop it, or give this one its own "
                "with store.spool_dir."
            ) from None
        self._held = file

    def _recover(self) -> None:
        for path in self.directory.glob("*.damaged"):
            # A number is not given again: what was set aside would be overwritten.
            self._next = max(self._next, int("0" + path.stem.partition("-")[0]) + 1)
        paths = _segments(self.directory)
        places: list[Place] = []
        story: list[_Found] = []
        for path in paths:
            number = int(path.stem)
            written_at = path.stat().st_mtime_ns // 1000
            content = path.read_bytes()
            scan = _scan(content, path, last=path is paths[-1])
            segment = _Segment(path, scan.mark, len(content) - scan.torn_bytes)
            if scan.torn_bytes:
                self.torn_bytes += scan.torn_bytes
                os.truncate(path, segment.size_bytes)
            self._next = max(self._next, number + 1)
            self._segments[number] = segment
            self.size_bytes += segment.size_bytes
            segment.live = len(scan.found) + len(scan.damaged)
            self._deliveries += segment.live
            # A clock that was set back must not end a gap before what is missing.
            written_at = max([written_at, *(at for *_, at in scan.found)])
            parts: list[tuple[int, _Found]] = []
            for offset, length in scan.damaged:
                self._set_aside(segment, offset, content[offset : offset + length])
                places.append((number, offset, length))
                account, at = _whose(content[offset : offset + length], scan.mark)
                parts.append((offset, _Found(account, at, written_at)))
            for offset, length, account, notifications, at in scan.found:
                received_at, until = _moment(at), _moment(written_at)
                segment.oldest = segment.oldest or received_at
                place = number, offset, length
                self._found.append(Spooled(place, account, notifications, received_at, until))
                parts.append((offset, _Found(account, at)))
            story += [part for _, part in sorted(parts, key=lambda each: each[0])]
            if not segment.live:
                self._remove(number)
        if places:
            self._unreadable = Lost(tuple(places), tuple(_missing(story)))


def _missing(story: Sequence[_Found]) -> list[Missing]:
    """What may be missing of each account that the story names; and of no account by name, what may be
    missing of those that it does not."""
    found: list[tuple[int | None, int | None, int]] = []
    # When something of the account was last received, and how many doubts were there.
    before: dict[int, tuple[int | None, int]] = {}
    # Damage that is known to be this account's, since then.
    own: dict[int, int] = {}
    doubts = doubts_until = 0
    for each in story:
        if each.account is None:
            doubts += 1
            doubts_until = max(doubts_until, each.written_at or 0)
            continue
        last, doubted = before.get(each.account, (None, 0))
        if each.at is None:
            own[each.account] = max(own.get(each.account, 0), each.written_at or 0)
            before[each.account] = last, doubted
            continue
        if each.written_at is not None or own.pop(each.account, None) is not None or doubts > doubted:
            found.append((each.account, last, each.at))
        before[each.account] = each.at, doubts
    for account, (last, doubted) in before.items():
        until = max(own.get(account, 0), doubts_until if doubts > doubted else 0)
        if until:
            found.append((account, last, until))
    if len(found) > MISSING_MAX:
        found = _coarser(found)
    if doubts:
        found.append((None, None, doubts_until))
    return [
        Missing(account, _moment(until), None if since is None else _moment(since))
        for account, since, until in found
    ]


def _coarser(found: Sequence[tuple[int | None, int | None, int]]) -> list[tuple[int | None, int | None, int]]:
    """One stretch for each account: from the first beginning to the last end."""
    whole: dict[int | None, tuple[int | None, int]] = {}
    for account, since, until in found:
        first, last = whole.get(account, (since, until))
        whole[account] = (None if first is None or since is None else min(first, since)), max(last, until)
    return [(account, since, until) for account, (since, until) in whole.items()]


def _moment(at: int) -> datetime:
    return _EPOCH + at * _MICROSECOND


# ── the format ────────────────────────────────────────────────────────────────────────────────────────


def _segments(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*.spool") if path.stem.isdecimal())


def _header(mark: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, mark, zlib.crc32(_MAGIC + mark))


def _record(mark: bytes, heard: Sequence[Heard], payload: bytes) -> bytes:
    first = heard[0]
    at = (first.received_at - _EPOCH) // _MICROSECOND
    fields = _FIELDS.pack(len(payload), first.account, len(heard), at)
    checksum = zlib.crc32(payload, zlib.crc32(fields))
    return b"".join((mark, fields, checksum.to_bytes(4, "big"), payload))


def _mark_of(content: bytes, path: Path) -> bytes | None:
    """The mark that either copy of the header gives; None when both are damaged or missing."""
    for at in (0, _HEADER.size):
        if len(content) >= at + _HEADER.size:
            magic, mark, checksum = _HEADER.unpack_from(content, at)
            if zlib.crc32(magic + mark) == checksum:
                if magic != _MAGIC:
                    raise StoreError(
                        f"{path} was written by another version of listener: drain it with that one, or move "
                        "it away."
                    )
                return bytes(mark)
    return None


def _whole(content: bytes, at: int, mark: bytes, *, check: bool = True) -> int:
    """The length of the whole record that begins at `at`; 0 when there is none."""
    if len(content) - at < _RECORD.size or content[at : at + _MARK_BYTES] != mark:
        return 0
    _, length, _, _, _, checksum = _RECORD.unpack_from(content, at)
    end = at + _RECORD.size + length
    if end > len(content):
        return 0
    if check:
        seen = zlib.crc32(content[at + _MARK_BYTES : at + _MARK_BYTES + _FIELDS.size])
        if zlib.crc32(memoryview(content)[at + _RECORD.size : end], seen) != checksum:
            return 0
    return int(end - at)


def _messages(payload: bytes) -> list[Heard] | None:
    """What a record holds; None where that cannot be read."""
    try:
        heard: list[Heard] = _decode(payload)
    except (msgspec.MsgspecError, ValueError, OverflowError):  # also what damaged text and moments raise
        return None
    return heard


def _whose(stretch: bytes, mark: bytes) -> tuple[int | None, int | None]:
    """The account of a damaged record, and when it was received; None where its two copies do not agree, or
    the stretch is not one record."""
    if _whole(stretch, 0, mark, check=False) != len(stretch):
        return None, None
    _, _, account, notifications, at, _ = _RECORD.unpack_from(stretch)
    payload = stretch[_RECORD.size :]
    heard = _messages(payload)
    if heard is None:
        # The account is the first field of the first message, behind the heads of the list and of the map.
        named = payload.find(_ACCOUNT + _encode(account), 0, 32)
        return (account if named in (2, 4, 6) else None), None
    moments = {(one.received_at - _EPOCH) // _MICROSECOND for one in heard}
    if len(heard) != notifications or {one.account for one in heard} != {account}:
        return None, None
    return account, at if moments == {at} else None


def _scan(content: bytes, path: Path, *, last: bool) -> _Scan:
    """Find every record of a segment, and what is none. Raises StoreError for another version's."""
    scan = _Scan()
    mark = _mark_of(content, path)
    if mark is None:
        if last and len(content) < _BEGIN:
            scan.torn_bytes = len(content)
        elif content:
            scan.damaged.append((0, len(content)))
        return scan
    scan.mark = mark
    if last and len(content) < _BEGIN:
        scan.torn_bytes = len(content)
        return scan
    at = _BEGIN
    while at < len(content):
        if length := _whole(content, at, mark):
            _, _, account, notifications, received, _ = _RECORD.unpack_from(content, at)
            scan.found.append((at, length, account, notifications, received))
            at += length
            continue
        following = content.find(mark, at + 1)
        if following < 0:
            if last and _torn(content, at, mark):
                scan.torn_bytes = len(content) - at
                break
            following = at + (_whole(content, at, mark, check=False) or len(content) - at)
        scan.damaged.append((at, following - at))
        at = following
    return scan


def _torn(content: bytes, at: int, mark: bytes) -> bool:
    """Whether the rest is what an append leaves when it is interrupted: the beginning of a record that is
    longer than what is there, or the zeros of a file that had grown before its bytes were written.

    If all messages of the record are there, then it is its length that is wrong, and that is damage.
    """
    rest = content[at:]
    begins = rest[:_MARK_BYTES] == mark[: len(rest)]
    if not begins or _whole(content, at, mark, check=False):
        return not any(rest)
    if len(rest) <= _RECORD.size:
        return True
    notifications: int = _RECORD.unpack_from(rest)[3]
    heard = _messages(rest[_RECORD.size :])
    return heard is None or len(heard) != notifications


def _write_all(file: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(file, left) :]


def _fsync_directory(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


# ── for people ────────────────────────────────────────────────────────────────────────────────────────


def inspect(directory: Path) -> SpoolReport:
    """Say what lies in a spool, also while a listener uses it: reads every checksum, and changes nothing.

    Raises StoreError when it may not be read.
    """
    segments: list[SegmentReport] = []
    accounts: dict[int, int] = {}
    set_aside: dict[str, int] = {}
    in_use = False
    try:
        if exists := directory.is_dir():
            in_use = _in_use(directory)
            paths = _segments(directory)
            set_aside = {path.name: path.stat().st_size for path in sorted(directory.glob("*.damaged"))}
            for path in paths:
                # What is drained meanwhile is gone.
                with contextlib.suppress(FileNotFoundError):
                    segments.append(_reported(path, accounts, last=path is paths[-1]))
    except OSError as error:
        raise StoreError(
            f"The spool in {directory} cannot be read ({error.strerror}): ask as the listener's user."
        ) from None
    return SpoolReport(
        directory=str(directory),
        exists=exists,
        in_use=in_use,
        segments=tuple(segments),
        records=sum(each.records for each in segments),
        notifications=sum(each.notifications for each in segments),
        size_bytes=sum(each.size_bytes for each in segments),
        oldest=min((each.oldest for each in segments if each.oldest), default=None),
        newest=max((each.newest for each in segments if each.newest), default=None),
        accounts=dict(sorted(accounts.items())),
        damaged=sum(each.damaged for each in segments),
        set_aside=set_aside,
    )


def _reported(path: Path, accounts: dict[int, int], *, last: bool) -> SegmentReport:
    content = path.read_bytes()
    scan = _scan(content, path, last=last)
    for _, _, account, notifications, _ in scan.found:
        accounts[account] = accounts.get(account, 0) + notifications
    moments = [_EPOCH + at * _MICROSECOND for *_, at in scan.found]
    return SegmentReport(
        name=path.name,
        size_bytes=len(content),
        records=len(scan.found),
        notifications=sum(notifications for _, _, _, notifications, _ in scan.found),
        oldest=min(moments, default=None),
        newest=max(moments, default=None),
        damaged=len(scan.damaged),
        torn_bytes=scan.torn_bytes,
    )


def _in_use(directory: Path) -> bool:
    try:
        file = os.open(directory / "lock", os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
