"""House rules that no linter knows. Each says what to do when it is red.

Docstrings, banned names and imports are ruff's (`pyproject.toml`); import directions are import-linter's.
"""

import re
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from listener import configuration, settings
from listener.core.calls import GAP_CAUSES
from listener.core.normalise import diagram
from listener.metrics import Metrics

ROOT = Path(__file__).parents[1]
PROMISES = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / configuration.EXAMPLE

TESTED_ELSEWHERE = {
    "errors": "a tree of names without behaviour",
    "simulator/settings": "refused values are in tests/test_cli.py; the rest are figures",
    "store/batch": "tests/store/test_journal.py: half of the journal, without a face of its own",
    "store/ledger": "tests/store/test_coverage.py",
    "store/migrate": "tests/test_migrations.py",
    "store/rows": "tests/store/test_journal.py: the other half",
    "store/schema": "tests/test_migrations.py compares it with what the migrations make",
}
"""Modules without a test file of their name, and where they are tested instead, or why not."""

FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "base", "misc", "tools"}


def _python(*folders: str) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "node_modules" not in path.parts:
                yield path.relative_to(ROOT)


def test_every_module_has_its_test() -> None:
    """The tests mirror the package: add the file, or say in TESTED_ELSEWHERE why there is none."""
    lacking = []
    for path in _python("listener"):
        module = path.relative_to("listener").with_suffix("")
        if module.name.startswith("__") or str(module) in TESTED_ELSEWHERE:
            continue
        test = Path("tests") / module.parent / f"test_{module.name}.py"
        if not (ROOT / test).is_file():
            lacking.append(f"{path} has no {test}")
    assert lacking == []


def test_exceptions_from_the_mirror_are_needed() -> None:
    """What has its test file, or is no module any more, needs no excuse."""
    for module in TESTED_ELSEWHERE:
        path = Path(module)
        assert (ROOT / "listener" / path.with_suffix(".py")).is_file(), module
        assert not (ROOT / "tests" / path.parent / f"test_{path.name}.py").is_file(), module


def test_names_say_what_belongs_there() -> None:
    """A module called utils says that nobody decided what belongs there: name what it does."""
    bad = [
        str(path)
        for path in _python("listener", "tests", "benchmarks", "migrations")
        if {*path.parts[:-1], path.stem} & FORBIDDEN_NAMES
    ]
    assert bad == []


def test_no_test_sleeps() -> None:
    """A test waits for a condition: only a `while` that a time-out bounds may pause; a turn (0) is none."""
    sleeping = []
    for path in _python("tests"):
        if not path.name.startswith("test_") or path.name == "test_house.py":
            continue
        before = ""
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
            pause = re.search(
                r"\b(asyncio|time)\.sleep\((?!0\))|from (asyncio|time) import .*\bsleep\b", line
            )
            if pause and not before.lstrip().startswith("while "):
                sleeping.append(f"{path}:{number}")
            before = line if line.strip() else before
    assert sleeping == []


@pytest.mark.parametrize(
    ("mark", "reason", "folders"),
    [
        (r"# noqa: (\w+)", r" +[-:–] \S", ("listener", "tests", "benchmarks", "migrations")),
        (r"# type: ignore\[([\w-]+)\]", r" +# \S", ("listener",)),
    ],
)
def test_exceptions_give_their_reason(mark: str, reason: str, folders: tuple[str, ...]) -> None:
    """An exception to a rule says why, at least the first time that a file takes it."""
    silent = []
    for path in _python(*folders):
        if path.name == "test_house.py":
            continue
        given: dict[str, bool] = defaultdict(bool)
        for line in (ROOT / path).read_text(encoding="utf-8").splitlines():
            if found := re.search(mark + r"((?:, \w+)*)", line):
                for code in (found[1], *filter(None, found[2].split(", "))):
                    given[code] |= re.search(re.escape(found[0]) + reason, line) is not None
        silent += [f"{path}: {code}" for code, has_reason in given.items() if not has_reason]
    assert silent == []


def test_switched_off_rules_give_their_reason() -> None:
    """Each rule that `pyproject.toml` switches off stands on a line that says why."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lint = text[text.index("[tool.ruff.lint]") : text.index("[tool.ruff.lint.flake8-tidy-imports")]
    silent = [line for line in lint.splitlines() if re.match(r'\s+"[A-Z]+\d*",', line) and "#" not in line]
    assert silent == []


# ── What documents say ────────────────────────────────────────────────────────────────────────────────


def test_the_readme_shows_the_table_of_states() -> None:
    """The diagram is generated: paste what `listener.core.normalise.diagram()` gives between the marks."""
    shown = README.partition("<!-- diagram -->\n```mermaid\n")[2].partition("\n```\n<!-- /diagram -->")[0]
    assert shown == diagram()


def test_the_readme_lists_the_metrics() -> None:
    """Each metric stands in the README with its labels and help, and no other does."""
    rows = re.findall(r"^\| `(listener_\w+)` \| (.*?) \| (.*?) \|$", README, flags=re.MULTILINE)
    assert rows == [
        (metric.name, ", ".join(f"`{label}`" for label in metric.labels) or "–", metric.help)
        for metric in Metrics().catalogue()
    ]


def test_the_readme_gives_the_command_of_ci() -> None:
    """What the README calls the test is what CI runs."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    (command,) = [line for line in ci if line.startswith("make ")]
    assert re.search(rf"^    {command} +# .*what CI runs$", README, flags=re.MULTILINE)


def test_the_readme_and_the_help_give_the_exit_codes() -> None:
    """The table of the README and the end of `listener --help` say the same."""
    from listener import cli

    shown = dict(re.findall(r"^\| (\d+) \| (.*?) \|$", README, flags=re.MULTILINE))
    helped = dict(re.findall(r"^  (\d+) +(.*)$", cli.EPILOG.partition("exit codes:")[2], flags=re.MULTILINE))
    assert {code: words.replace("`", "") for code, words in shown.items()} == helped
    codes = {cli.OK, cli.NEGATIVE, cli.USAGE, cli.STORE, cli.REMOTE, cli.INTERNAL, cli.INTERRUPTED}
    assert {int(code) for code in shown} == codes


_TABLES: dict[str, type[BaseModel]] = {
    "[store]": settings.Store,
    "[environments.production]": settings.Environment,
    "[[accounts]]": settings.Account,
    "[noojee.pbx]": settings.NoojeePbx,
    "[click2dial.c2d]": settings.Click2DialPbx,
    "[api]": settings.Api,
    "[operations]": settings.Operations,
    "[limits]": settings.Limits,
    "[log]": settings.Log,
}


def _example() -> dict[str, dict[str, tuple[Any, bool]]]:
    """Each setting of the example by its table, with its value and whether it is commented out."""
    found: dict[str, dict[str, tuple[Any, bool]]] = defaultdict(dict)
    table = ""
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        if header := re.match(r"(?:# )?(\[\[?[a-z0-9.]+\]\]?)$", line):
            table = header[1]
        elif match := re.match(r"(# )?([a-z_]+ = .+)", line):
            ((name, value),) = tomllib.loads(match[2]).items()
            found[table][name] = (value, match[1] is not None)
    return found


def test_the_example_has_every_setting() -> None:
    """Each setting stands in the example file, with its default where it is commented out and has one."""
    example = _example()
    assert set(example[""]) == {"accounts_file"}
    for table, model in _TABLES.items():
        assert set(example[table]) == set(model.model_fields), table
        for name, (shown, commented) in example[table].items():
            default = model.model_fields[name].get_default(call_default_factory=True)
            if commented and not model.model_fields[name].is_required() and default not in (None, "", {}):
                told = list(default) if isinstance(default, tuple) else default
                assert shown == (str(told) if isinstance(told, Path) else told), f"{table} {name}"


def test_the_example_is_accepted() -> None:
    """The example can be copied and run as it is, once its password is there."""
    loaded = configuration.load(EXAMPLE, environ={"AGENT5001_PASSWORD": "x"})
    assert [account.login for account in loaded.accounts] == ["agent5001"]


def test_the_readme_names_the_columns_of_an_accounts_file() -> None:
    """Each column that an accounts file may have stands in the README."""
    sentence = README.partition("Its columns are those of `[[accounts]]`: ")[2].partition(". ")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == set(settings.Account.model_fields)


FAULTS_MIN = 25


def _faults(section: str) -> list[list[str]]:
    """The rows of a table of faults in docs/promises.md, cell by cell."""
    table = PROMISES.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows if set(row[0].strip()) != {"-"}][1:]


@pytest.mark.parametrize("section", ["The faults", "Dials"])
def test_each_fault_has_its_row_and_each_row_its_test(section: str) -> None:
    """A row is a fault, what is seen of it, what it costs, and tests that exist, also with that parameter."""
    rows = _faults(section)
    support = "".join((ROOT / path).read_text(encoding="utf-8") for path in _python("tests/support"))
    assert len(rows) >= FAULTS_MIN
    assert len({row[0] for row in rows}) == len(rows)
    missing = []
    for row in rows:
        assert len(row) == 4, row
        assert all(row), row
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)(?:\[([^\]]+)\])?`", row[3])
        if not tests or re.sub(r"`[^`]+`", "", row[3]).strip():
            missing.append(f"{row[0]}: no test, or something that is none: {row[3]}")
        for path, name, parameter in tests:
            text = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else ""
            if not re.search(rf"^(?:async )?def {name}\(", text, flags=re.MULTILINE):
                missing.append(f"{row[0]}: {path} has no {name}")
            elif parameter and f'"{parameter}"' not in text + support:
                missing.append(f"{row[0]}: {name} has no {parameter}")
    assert missing == []


def test_the_promises_use_the_names_that_are_there() -> None:
    """Each metric, cause of a gap and log line that docs/promises.md names is one of ours."""
    metrics = {metric.name for metric in Metrics().catalogue()}
    assert set(re.findall(r"`(listener_\w+)", PROMISES)) <= metrics
    assert set(re.findall(r"\bgap `([\w ]+)`", PROMISES)) <= GAP_CAUSES
    said = "".join((ROOT / path).read_text(encoding="utf-8") for path in _python("listener"))
    lines = re.findall(r'`"([^"`]+)"`', PROMISES) + re.findall(r'`` ?"([^"]+)" ?``', PROMISES)
    assert [line for line in lines if f'"{line}"' not in said] == []


def test_documents_link_to_files_that_exist() -> None:
    """A relative link leads somewhere."""
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "grafana" / "README.md"):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_wheel_has_what_it_needs(tmp_path: Path) -> None:
    """`listener db upgrade` works without a checkout: the wheel carries the migrations, types and command."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [name for name in names if name.endswith("/entry_points.txt")]
        assert "listener = listener.cli:main" in archive.read(entry_points).decode()
    migrations = [path for path in (ROOT / "migrations").rglob("*") if path.suffix in {".py", ".mako"}]
    modules = [ROOT / path for path in _python("listener")]
    wanted = {f"listener/store/{path.relative_to(ROOT)}" for path in migrations}
    wanted |= {str(path.relative_to(ROOT)) for path in modules} | {"listener/py.typed"}
    assert wanted - names == set()
    assert len(migrations) >= 3
