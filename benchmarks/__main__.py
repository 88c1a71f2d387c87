"""Every benchmark, one after the other, each in a process of its own: a JSON line each.

They share the machine with nothing but themselves, so none runs beside another. A benchmark that fails does
not keep the others from running, but the exit code says so.
"""

import subprocess
import sys

BENCHMARKS = ("core", "journal", "wire", "sessions")


def main() -> int:
    """Run all; 1 if one of them failed."""
    failed = 0
    for name in BENCHMARKS:
        print(f"· {name}", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False)
        failed |= done.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
