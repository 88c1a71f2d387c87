"""The spool: what was appended comes back, whatever happens to the file or the process in between."""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from listener.core.calls import Heard, Missing, Source
from listener.errors import SpoolFull, StoreError
from listener.store import spool as spool_module
from listener.store.spool import Spool, inspect
from tests.support.memory import Said

AT = datetime(2026, 3, 2, 8, 0, tzinfo=UTC)


def deliveries(count: int, *, account: int = 1, size: int = 2, padding: int = 0) -> list[list[Heard]]:
    """What one account says."""
    said = Said(account, f"stream-{account}", padding=padding)
    return [said.next(size) for _ in range(count)]


def recovered(directory: Path) -> tuple[Spool, list[list[Heard] | None]]:
    """The spool as the next process finds it, and what lies in it; it is closed."""
    spool = Spool.open(directory)
    heard = spool.read([each.place for each in spool.left()])
    spool.close()
    return spool, heard


def segments(directory: Path) -> list[Path]:
    """The segments' files."""
    return sorted(directory.glob("*.spool"))


# ── What it promises when all is well ─────────────────────────────────────────────────────────────────


def test_every_field_of_what_was_heard_comes_back(tmp_path: Path) -> None:
    """Also bytes that are no text, a snapshot's times, and where the session can be resumed."""
    whole = Heard(
        7,
        "0b2f3f1e-0000-4000-8000-000000000001",
        41,
        AT + timedelta(microseconds=123_457),
        "/v2/me/calls",
        b'\x00\xff{"a":1,"a":2}\xed\xa0\x80',
        Source.SNAPSHOT,
        AT - timedelta(seconds=1),
        (12, 43),
    )
    spool = Spool.open(tmp_path / "spool")
    places = spool.append([[whole], [*deliveries(1)[0]]])
    assert spool.read(places) == [[whole], deliveries(1)[0]]
    spool.close()
    assert recovered(tmp_path / "spool")[1] == [[whole], deliveries(1)[0]]


def test_nothing_is_made_before_the_first_append(tmp_path: Path) -> None:
    """A store that is never away costs no file, not even a directory."""
    spool = Spool.open(tmp_path / "spool")
    assert spool.left() == []
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_only_its_owner_may_look(tmp_path: Path) -> None:
    """It holds personal data: 0700 for the directory, 0600 for its files, whatever the umask."""
    before = os.umask(0)
    try:
        spool = Spool.open(tmp_path / "spool")
        spool.append(deliveries(2))
    finally:
        os.umask(before)
    spool.close()
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "spool").iterdir()} == {0o600}
    (tmp_path / "spool").chmod(0o750)
    with pytest.raises(StoreError, match=r"chmod 700"):
        Spool.open(tmp_path / "spool")


def test_a_segment_goes_when_all_of_it_is_committed(tmp_path: Path) -> None:
    """Segments are removed one by one, also out of order, and a drained spool takes no room."""
    tmp_path.chmod(0o700)
    spool = Spool.open(tmp_path, segment_bytes_max=400)
    places = [spool.append([each])[0] for each in deliveries(6)]
    assert [number for number, _, _ in places] == [1, 2, 3, 4, 5, 6]
    assert spool.oldest is not None
    spool.release(places[2:])
    assert [path.stem for path in segments(tmp_path)] == ["000000000001", "000000000002"]
    assert spool.size_bytes == sum(path.stat().st_size for path in segments(tmp_path))
    spool.release(places[:2])
    assert segments(tmp_path) == []
    assert spool.size_bytes == 0
    assert inspect(tmp_path).oldest is None
    again = spool.append(deliveries(1))
    assert again[0][0] == 7
    assert spool.read(again) == deliveries(1)
    spool.close()


def test_what_is_not_released_is_found_again_in_order(tmp_path: Path) -> None:
    """Of several accounts, in the order in which it was appended; a second run adds behind it."""
    directory = tmp_path / "spool"
    said = [each for pair in zip(deliveries(5), deliveries(5, account=2), strict=True) for each in pair]
    spool = Spool.open(directory, segment_bytes_max=1000)
    places = spool.append(said[:4])
    for each in said[4:8]:
        spool.append([each])
    spool.release(places)
    spool.close()
    second = Spool.open(directory)
    left = second.left()
    assert [(each.account, each.notifications) for each in left] == [(1, 2), (2, 2)] * 2
    assert [each.received_at for each in left] == [said[0][0].received_at] * 4
    second.append(said[8:])
    second.close()
    assert recovered(directory)[1] == said[4:]
    assert second.left() == []


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """A second listener is told, at its start or, where there was no spool yet, at its first append."""
    directory = tmp_path / "spool"
    first, second = Spool.open(directory), Spool.open(directory)
    first.append(deliveries(1))
    with pytest.raises(StoreError, match="Another listener uses the spool"):
        Spool.open(directory)
    with pytest.raises(SpoolFull, match="Another listener uses the spool"):
        second.append(deliveries(1))
    first.close()
    Spool.open(directory).close()
    second.close()


# ── Its bounds ────────────────────────────────────────────────────────────────────────────────────────


def test_a_full_spool_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    """At the bound an append is refused as a whole; what is released makes room."""
    spool = Spool.open(tmp_path / "spool", bytes_max=3000)
    one, *others = deliveries(30)
    places = spool.append([one])
    with pytest.raises(SpoolFull, match=r"full .*raise limits.spool_bytes_max"):
        spool.append(others)
    assert spool.read(places) == [one]
    spool.release(places)
    assert spool.read(spool.append(others[:3])) == others[:3]
    spool.close()


def test_so_many_deliveries_and_no_more(tmp_path: Path) -> None:
    """Each takes memory for who waits for it."""
    spool = Spool.open(tmp_path / "spool", deliveries_max=3)
    places = spool.append(deliveries(3))
    with pytest.raises(SpoolFull, match="3 deliveries"):
        spool.append(deliveries(1))
    spool.release(places[:1])
    spool.append(deliveries(1))
    spool.close()


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from listener.errors import SpoolFull
from listener.store.spool import Spool
from tests.support.memory import Said
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
said = Said(1, "s", padding=1000)
spool = Spool.open(Path(sys.argv[1]))
kept = spool.append([said.next()])
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
lost = said.next(), said.next()
try:
    spool.append(lost)
except SpoolFull as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
places = spool.append(lost)
assert spool.read([*kept, *places]) == [said.said[:1], *lost]
"""


def test_a_disk_that_refuses_in_the_middle_of_a_record_leaves_no_half_record(tmp_path: Path) -> None:
    """A write that the system cuts short is taken back, said, and may be tried again."""
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path / "spool")], check=True, capture_output=True, text=True
    )
    assert "cannot be written (File too large): make room" in done.stdout
    spool, heard = recovered(tmp_path / "spool")
    assert [one.position for each in heard for one in each or ()] == [1, 2, 3]
    assert (spool.damaged, spool.torn_bytes) == (0, 0)


def test_a_directory_that_cannot_be_made_is_a_full_spool(tmp_path: Path) -> None:
    """What waits stays in memory, and the message says what to change."""
    (tmp_path / "file").write_text("")
    spool = Spool.open(tmp_path / "file" / "spool")
    with pytest.raises(SpoolFull, match=r"Not a directory.*store.spool_dir"):
        spool.append(deliveries(1))


# ── Damage ────────────────────────────────────────────────────────────────────────────────────────────


def written(directory: Path, said: Sequence[list[Heard]], *, segment_bytes_max: int = 2**20) -> None:
    """A spool whose process is gone."""
    spool = Spool.open(directory, segment_bytes_max=segment_bytes_max)
    for each in said:
        spool.append([each])
    spool.close()


def test_a_torn_tail_is_cut_and_nothing_else(tmp_path: Path) -> None:
    """A record that a crash cut short was never reported as written; the next process removes it."""
    directory = tmp_path / "spool"
    said = deliveries(3)
    written(directory, said)
    (path,) = segments(directory)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    assert inspect(directory).segments[0].torn_bytes > 0
    assert inspect(directory).damaged == 0
    spool, heard = recovered(directory)
    assert heard == said[:2]
    assert (spool.damaged, spool.torn_bytes > 0) == (0, True)
    assert (inspect(directory).segments[0].torn_bytes, inspect(directory).records) == (0, 2)
    assert list(directory.glob("*.damaged")) == []


def test_zeros_at_the_end_are_what_a_power_cut_leaves(tmp_path: Path) -> None:
    """A file may have grown before its bytes were written."""
    directory = tmp_path / "spool"
    written(directory, deliveries(2))
    (path,) = segments(directory)
    with path.open("ab") as file:
        file.write(bytes(500))
    spool, heard = recovered(directory)
    assert (heard, spool.damaged, spool.torn_bytes) == (deliveries(2), 0, 500)


def test_a_damaged_record_is_set_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    """Its bytes are kept beside the segment and stay when the segment goes; numbers are not given again."""
    directory = tmp_path / "spool"
    said = deliveries(4)
    spool = Spool.open(directory)
    places = spool.append(said)
    spool.close()
    (path,) = segments(directory)
    content = bytearray(path.read_bytes())
    _, offset, length = places[1]
    content[offset + 20] ^= 1
    path.write_bytes(content)
    aside = directory / f"000000000001-{offset}.damaged"
    for _ in range(2):
        spool, heard = recovered(directory)
        assert heard == [said[0], *said[2:]]
        assert spool.damaged == 1
        assert aside.read_bytes() == content[offset : offset + length]
        assert aside.stat().st_mode & 0o777 == 0o600
    spool = Spool.open(directory)
    spool.release([each.place for each in spool.left()])
    assert segments(directory) == [path], "it is not told yet what is missing"
    spool.release(spool.lost().places)
    assert segments(directory) == []
    assert aside.exists()
    spool.close()
    spool = Spool.open(directory)
    assert spool.append(deliveries(1))[0][0] == 2
    spool.close()


def told(directory: Path, said: Sequence[list[Heard]], *damage: tuple[int, int, bytes]) -> list[Missing]:
    """What the next process says is missing when, of these deliveries, so many bytes from the beginning of
    the records with these numbers are other ones; the file was last written to at 08:10."""
    spool = Spool.open(directory)
    places = spool.append(said)
    spool.close()
    (path,) = segments(directory)
    content = bytearray(path.read_bytes())
    for number, behind, other in damage:
        at = places[number][1] + behind
        content[at : at + len(other)] = other
    path.write_bytes(content)
    written_at = minutes(10).timestamp()
    os.utime(path, (written_at, written_at))
    spool = Spool.open(directory)
    lost = spool.lost()
    assert len(lost.places) == spool.damaged > 0
    assert spool.lost().places == ()
    spool.release(lost.places)
    spool.close()
    return list(lost.missing)


def minutes(count: float) -> datetime:
    """So long after the beginning."""
    return AT + timedelta(minutes=count)


def spoken(*accounts: int) -> list[list[Heard]]:
    """A delivery of each account, in turn, a minute after the other."""
    lines = {account: Said(account, f"stream-{account}") for account in accounts}
    found = []
    for number, account in enumerate(accounts):
        lines[account].at = minutes(number)
        found.append(lines[account].next(2))
    return found


def payload(heard: list[Heard]) -> bytes:
    """What a record of these messages holds."""
    return msgspec.msgpack.encode(heard)


HEAD = 36
"""Bytes before the payload of a record."""


def test_what_is_missing_was_heard_by_the_account_that_header_and_payload_name(tmp_path: Path) -> None:
    """A record whose account and time are there twice says exactly when; one of which only the account can
    still be read was received between its neighbours of that account, or before the file's last write."""
    said = spoken(1, 2, 1, 2, 1, 2)
    raw = HEAD + payload(said[2]).index(b"Ringing")
    assert told(tmp_path / "text", said, (2, raw, b"rinGing")) == [Missing(1, minutes(2), minutes(0))]
    name = HEAD + payload(said[2]).index(b"channel")
    assert told(tmp_path / "name", said, (2, name, b"\xc1")) == [Missing(1, minutes(4), minutes(0))]
    assert told(tmp_path / "first", said, (0, name, b"\xc1")) == [Missing(1, minutes(2), None)]
    assert told(tmp_path / "last", said, (5, name, b"\xc1")) == [Missing(2, minutes(10), minutes(3))]
    assert told(tmp_path / "time", said, (5, 28, b"\x07")) == [Missing(2, minutes(10), minutes(3))]
    neither = told(tmp_path / "neither", said, (5, 12, b"\x07"), (5, name, b"\xc1"))
    assert neither[-1] == Missing(None, minutes(10))
    twice = [Missing(1, minutes(2), None), Missing(1, minutes(10), minutes(2))]
    assert told(tmp_path / "two", said, (0, name, b"\xc1"), (4, name, b"\xc1")) == twice


@pytest.mark.parametrize(
    ("behind", "other"), [(12, b"\x07"), (4, b"\x07"), (HEAD + 10, b"\x07"), (-20, bytes(60))]
)
def test_what_may_have_been_anybodys_is_missing_of_everybody(
    behind: int, other: bytes, tmp_path: Path
) -> None:
    """Where the account of a record is not what its other copy says, where the record does not begin or end
    where it should: of each account between its neighbours, and of those that have none here
    before the file's last write."""
    said = spoken(1, 2, 3, 1, 2)
    missing = told(tmp_path / "spool", said, (2, behind, other))
    lost_two = behind < 0
    assert missing == [
        Missing(1, minutes(3), minutes(0)),
        *([] if lost_two else [Missing(2, minutes(4), minutes(1))]),
        *([Missing(2, minutes(4), None)] if lost_two else []),
        Missing(None, minutes(10)),
    ]


def test_of_a_segment_without_a_header_everything_is_missing(tmp_path: Path) -> None:
    """Nobody knows what it held; the segments before and after it say between what."""
    directory = tmp_path / "spool"
    written(directory, spoken(1, 2, 1, 2), segment_bytes_max=300)
    first, second, third, *_ = segments(directory)
    second.write_bytes(bytes(500))
    for number, path in enumerate((first, second, third)):
        os.utime(path, (minutes(10 + number).timestamp(),) * 2)
    spool = Spool.open(directory)
    spool.close()
    assert set(spool.lost().missing) == {
        Missing(1, minutes(2), minutes(0)),
        Missing(2, minutes(3), None),
        Missing(None, minutes(11)),
    }


def test_of_very_much_damage_each_account_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its first stretch to its last: more is not observed, and it is bounded."""
    monkeypatch.setattr(spool_module, "MISSING_MAX", 2)
    said = spoken(1, 2, 1, 2, 1, 2, 1)
    damage = [(number, 12, b"\x07") for number in (1, 3, 5)]
    assert told(tmp_path / "spool", said, *damage) == [
        Missing(1, minutes(6), minutes(0)),
        Missing(None, minutes(10)),
    ]


def test_damage_that_shows_only_when_it_is_read_back_is_set_aside_too(tmp_path: Path) -> None:
    """The disk may turn a bit while the process runs; a file that is gone cannot be kept."""
    directory = tmp_path / "spool"
    said = deliveries(3)
    spool = Spool.open(directory)
    places = spool.append(said)
    (path,) = segments(directory)
    content = bytearray(path.read_bytes())
    content[places[1][1] + 40] ^= 255
    path.write_bytes(content)
    assert spool.read(places) == [said[0], None, said[2]]
    assert spool.damaged == 1
    assert inspect(directory).set_aside == {f"000000000001-{places[1][1]}.damaged": places[1][2]}
    path.unlink()
    assert spool.read(places[:1]) == [None]
    spool.release(places)
    spool.close()


def test_a_message_cannot_pass_for_a_record(tmp_path: Path) -> None:
    """What looks like a record of another segment inside a damaged one is no record here."""
    directory = tmp_path / "spool"
    written(tmp_path / "other", deliveries(1, account=66))
    forged = segments(tmp_path / "other")[0].read_bytes()
    outer = [Heard(1, "s", 1, AT, "/v2/me/calls", forged)]
    written(directory, [outer, *deliveries(1)])
    (path,) = segments(directory)
    content = bytearray(path.read_bytes())
    content[41 + 8] ^= 1
    path.write_bytes(content)
    assert recovered(directory)[1] == deliveries(1)


def test_a_message_cannot_pass_for_a_record_where_a_damaged_length_leads(tmp_path: Path) -> None:
    """Also where the damage makes a record end just where the forged one begins."""
    directory = tmp_path / "spool"
    written(tmp_path / "other", deliveries(1, account=66))
    forged = segments(tmp_path / "other")[0].read_bytes()[40:]
    written(directory, [[Heard(1, "s", 1, AT, "/v2/me/calls", forged)]])
    (path,) = segments(directory)
    content = bytearray(path.read_bytes())
    payload = 40 + 36
    content[48:52] = (content.index(forged) - payload).to_bytes(4, "big")
    path.write_bytes(content)
    spool, heard = recovered(directory)
    assert heard == []
    assert spool.damaged > 0


def test_a_last_record_that_is_whole_and_damaged_is_kept(tmp_path: Path) -> None:
    """It had been reported as written, so it is no torn tail: nothing that was safe is thrown away."""
    directory = tmp_path / "spool"
    written(directory, deliveries(2))
    (path,) = segments(directory)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    spool, heard = recovered(directory)
    assert (heard, spool.damaged, spool.torn_bytes) == (deliveries(1), 1, 0)
    (aside,) = directory.glob("*.damaged")
    assert content.endswith(aside.read_bytes())


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What we cannot read is not taken for damage."""
    directory = tmp_path / "spool"
    with monkeypatch.context() as patch:
        patch.setattr(spool_module, "_MAGIC", b"LSNSPOL\x02")
        written(directory, deliveries(1))
    with pytest.raises(StoreError, match="another version"):
        Spool.open(directory)
    with pytest.raises(StoreError, match="another version"):
        inspect(directory)


def _tells(one: Missing, lost: Heard, missing: Sequence[Missing]) -> bool:
    """Whether the loss of a message is told by one of these."""
    whose = {lost.account} if lost.account in {each.account for each in missing} else {None}
    return one.account in whose and (one.since or lost.received_at) <= lost.received_at <= one.until


MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a directory of its own is made there
"""Where an fsync takes no time, as thousands of them happen here."""

SHAPES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 60)), min_size=1, max_size=8)


@given(
    shapes=SHAPES,
    segment_bytes_max=st.sampled_from([300, 900, 2**20]),
    where=st.floats(0, 1, exclude_max=True),
    flip=st.one_of(st.none(), st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255))),
    cut=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_whatever_happens_to_the_files_only_what_was_hit_is_lost(
    shapes: list[tuple[int, int, int]],
    segment_bytes_max: int,
    where: float,
    flip: tuple[float, int] | None,
    *,
    cut: bool,
) -> None:
    """Any appends, then a crash at any byte of the last segment and one byte changed anywhere: recovery does
    not fail, gives what was not hit, in order, and says what it left out. Twice is as once."""
    said = [
        Said(account, f"stream-{account}", padding=pad, at=minutes(number)).next(size)
        for number, (account, size, pad) in enumerate(shapes)
    ]
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        directory = Path(place) / "spool"
        spool = Spool.open(directory, segment_bytes_max=segment_bytes_max)
        places = [spool.append([each])[0] for each in said]
        spool.close()
        files = segments(directory)
        hit: set[int] = set()
        torn = False
        if cut:
            at = int(where * files[-1].stat().st_size)
            os.truncate(files[-1], at)
            hit = {
                n
                for n, (segment, offset, length) in enumerate(places)
                if segment == len(files) and offset + length > at
            }
            torn = True
        flipped = False
        struck: set[int] = set()
        if flip is not None:
            sizes = [path.stat().st_size for path in files]
            target = int(flip[0] * sum(sizes))
            for number, (path, size) in enumerate(zip(files, sizes, strict=True), 1):
                if 0 <= target < size:
                    content = bytearray(path.read_bytes())
                    content[target] ^= flip[1]
                    path.write_bytes(content)
                    struck = {
                        n
                        for n, (s, offset, length) in enumerate(places)
                        if s == number and offset <= target < offset + length
                    } - hit
                    flipped = bool(struck)
                    hit |= struck
                    if cut and number == len(files) and target < 40 and size < 40:
                        flipped = False
                target -= size
        first, heard = recovered(directory)
        assert heard == [each for n, each in enumerate(said) if n not in hit]
        missing = first.lost().missing
        if not first.torn_bytes:
            assert all(any(_tells(one, said[n][0], missing) for one in missing) for n in struck)
        if flipped:
            assert first.damaged + (first.torn_bytes > 0) >= 1
        elif flip is None:
            assert first.damaged == 0
            assert bool(first.torn_bytes) <= torn
        second, again = recovered(directory)
        assert again == heard
        assert second.torn_bytes == 0


# ── For people ────────────────────────────────────────────────────────────────────────────────────────


def test_a_report_says_what_is_there_and_changes_nothing(tmp_path: Path) -> None:
    """While a listener uses it and afterwards, and where there is none."""
    directory = tmp_path / "spool"
    assert not inspect(directory).exists
    spool = Spool.open(directory, segment_bytes_max=600)
    for each in (*deliveries(2), *deliveries(3, account=2, size=1)):
        spool.append([each])
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    report = inspect(directory)
    assert report.in_use
    assert (report.records, report.notifications, report.accounts) == (5, 7, {1: 4, 2: 3})
    assert report.size_bytes == spool.size_bytes
    assert report.oldest == report.newest == deliveries(1)[0][0].received_at
    assert (report.damaged, report.set_aside) == (0, {})
    assert [each.records for each in report.segments] == [1, 2, 2] or len(report.segments) > 1
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    spool.close()
    assert not inspect(directory).in_use
    content = bytearray(segments(directory)[0].read_bytes())
    content[60] ^= 1
    segments(directory)[0].write_bytes(content)
    assert inspect(directory).damaged == 1


def test_a_record_whose_length_is_damaged_is_not_what_a_crash_cut_short(tmp_path: Path) -> None:
    """All of the last record lies on disk: it was reported as written, and one bit of its length changed."""
    spool = Spool.open(tmp_path / "spool")
    places = spool.append(deliveries(2))
    spool.close()
    (segment,) = (tmp_path / "spool").glob("*.spool")
    content = bytearray(segment.read_bytes())
    content[places[1][1] + 8 + 1] ^= 1  # the mark has eight bytes; then comes the length, big-endian
    segment.write_bytes(content)

    spool = Spool.open(tmp_path / "spool")
    lost = spool.lost()
    spool.close()

    assert spool.damaged == 1
    assert lost.missing != ()
