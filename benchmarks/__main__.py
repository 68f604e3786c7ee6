"""List the benchmarks, or run some of them by name.

    python -m benchmarks                     # list them
    python -m benchmarks training attention  # run these, one after the other
    python -m benchmarks all --quick         # all that have a quick form

Options after the names go to every benchmark that is run.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = {"__main__", "cost_model", "nanogpt", "results", "workers"}  # modules that benchmarks share


def benchmarks() -> dict[str, Path]:
    """Return the file of each benchmark, by name."""
    return {path.stem: path for path in sorted(HERE.glob("*.py")) if path.stem not in PARTS}


def main() -> int:
    found = benchmarks()
    words = sys.argv[1:]
    names = [word for word in words if not word.startswith("-")]
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        for name, path in found.items():
            summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
            print(f"{name:18}{' '.join(summary.split())}")
        return 0
    options = words[next((place for place, word in enumerate(words) if word.startswith("-")), len(words)) :]
    names = words[: len(words) - len(options)]
    if names == ["all"]:
        names = [name for name, path in found.items() if "--quick" not in options or '"--quick"' in path.read_text()]
    for name in names:
        if name not in found:
            print(f"error: there is no benchmark {name!r}; there are {', '.join(found)}", file=sys.stderr)
            return 2
    failed = []
    for name in names:
        print(f"\n=== {name} ===", flush=True)
        if subprocess.run([sys.executable, str(found[name]), *options], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
