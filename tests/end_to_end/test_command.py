"""The command as it is installed: from a wheel, without a checkout, and refusing in one sentence."""

import asyncio
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from listener.simulator.centre import Simulator
from listener.simulator.settings import SimulatorSettings
from tests.support.running import Centre, configuration

ROOT = Path(__file__).parent.parent.parent
BUILD_s = 60.0
RUN_s = 30.0


def run(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end; with `path` what is installed there goes before everything else."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LISTENER_")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_s,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    place = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(place)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=BUILD_s,
    )
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel's packages; what it depends on is this environment's."""
    place = tmp_path_factory.mktemp("installed")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(place), str(wheel)]
    subprocess.run([sys.executable, *pip], check=True, capture_output=True, timeout=BUILD_s)
    return place


def test_the_wheel_brings_its_migrations_and_nothing_of_the_tests(wheel: Path) -> None:
    """What is needed without a checkout is in it, and what is only needed with one is not."""
    names = zipfile.ZipFile(wheel).namelist()
    assert "listener/store/migrations/env.py" in names
    assert "listener/py.typed" in names
    assert {name.partition("/")[0] for name in names} - {"listener"} == {
        name.partition("/")[0] for name in names if ".dist-info/" in name
    }


def test_the_installed_command_helps_and_prepares_a_database(
    installed: Path, empty_database: str, tmp_path: Path
) -> None:
    """`listener --help` and `listener db upgrade` work in a directory that has nothing to do with us."""
    where = run("-c", "import listener; print(listener.__file__)", cwd=tmp_path, path=installed)
    assert where.stdout.startswith(str(installed)), "the checkout was used"
    helped = run("-m", "listener", "--help", cwd=tmp_path, path=installed)
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "db upgrade" in helped.stdout
    database = ("-m", "listener", "--set", f"store.dsn={empty_database}", "db")
    before = run(*database, "current", cwd=tmp_path, path=installed)
    assert (before.returncode, before.stdout) == (1, "empty\n")
    upgraded = run(*database, "upgrade", cwd=tmp_path, path=installed)
    assert upgraded.returncode == 0, upgraded.stderr
    after = run(*database, "current", cwd=tmp_path, path=installed)
    assert (after.returncode, after.stderr) == (0, "")


async def test_what_it_cannot_run_with_is_one_sentence_and_an_exit_code(
    database: str, empty_database: str, tmp_path: Path
) -> None:
    """Also where it shows only when the work has begun: no traceback, the cause and the cure."""
    async with Simulator(SimulatorSettings(accounts=1)) as simulator:
        centre = Centre("lab", simulator)
        (tmp_path / "ca.pem").write_text("no certificate")
        certificates = configuration(
            f'dsn = "{database}"', Centre("lab", simulator, 'ca_file = "ca.pem"')
        ).replace("http://", "https://")
        for number, (text, code, words) in enumerate(
            [
                (certificates, 2, "ca.pem: no certificates can be read from it"),
                (configuration(f'dsn = "{empty_database}"', centre), 3, "run `listener db upgrade`"),
                (
                    configuration('dsn = "postgresql://localhost/listener?sslmode=perhaps"', centre),
                    3,
                    "The DSN cannot be used",
                ),
            ]
        ):
            config = tmp_path / f"{number}.toml"
            config.write_text(text)
            refused = await asyncio.to_thread(run, "-m", "listener", "-c", str(config), "run", cwd=tmp_path)
            said = [line for line in refused.stderr.splitlines() if not line.startswith("{")]
            assert (refused.returncode, len(said)) == (code, 1), refused.stderr
            assert words in said[0]
