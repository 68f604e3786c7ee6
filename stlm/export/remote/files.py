"""The source files exported with a model: `modeling_stlm` and all that it imports of this project, in one folder.

transformers copies the modules next to a model that are imported as `from .NAME import …`, but not those in folders
below. So the module `stlm.model.network` becomes the file stlm_model_network.py, and imports of it are rewritten.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

ROOT = "stlm.export.remote.modeling_stlm"
NAME = "modeling_stlm"  # of its file
_IMPORT = re.compile(r"^(\s*)from ((?:stlm|data_pipeline)(?:\.\w+)*) import ", re.MULTILINE)


LICENCE = """\
MIT License

Copyright (c) 2026 The stlm authors

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


def remote_files() -> dict[str, str]:
    """Return the source of each file by name, including "modeling_stlm.py"; none imports this project."""
    files: dict[str, str] = {}
    waiting = [ROOT]
    while waiting:
        module = waiting.pop()
        if flat(module) in files:
            continue
        source = _source(module)
        files[flat(module)] = _flattened(source, module)
        waiting += [found[2] for found in _IMPORT.finditer(source)]
    return {f"{name}.py": source for name, source in sorted(files.items())}


def flat(module: str) -> str:
    """Return a module's name in the exported folder."""
    return NAME if module == ROOT else module.replace(".", "_")


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"no module {module}"
    return Path(spec.origin).read_text(encoding="utf-8")


def _flattened(source: str, module: str) -> str:
    flattened = _IMPORT.sub(lambda found: f"{found[1]}from .{flat(found[2])} import ", source)
    for node in ast.walk(ast.parse(flattened)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        for name in names:
            assert name.split(".")[0] not in ("stlm", "data_pipeline"), f"{module} imports {name} in another way"
    return f"# {module} of the project stlm, as it was when this model was exported.\n{flattened}"
