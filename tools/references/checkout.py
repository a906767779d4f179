"""What a recorder needs of a published repository: its code as it was committed, and where that code is from.

A file is read from the commit, not from the working tree: a bare clone will do, and a fixture names exactly what ran.
Published files often load weights or write folders when they are imported, and import what no recorder needs: so either
single definitions are executed, or the whole module with stand-ins for such imports.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkout:
    """A clone of one repository at its HEAD."""

    path: Path
    commit: str

    @classmethod
    def at(cls, path: Path) -> Checkout:
        """Open a clone; SystemExit with a line for the user where there is none."""
        done = subprocess.run(
            ["git", "-C", str(path), "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"error: {path} is no clone of a git repository. Give the path of one.")
        return cls(path=path, commit=done.stdout.strip())

    def files(self) -> Sequence[str]:
        """Names at the top of the commit's tree."""
        done = subprocess.run(
            ["git", "-C", str(self.path), "ls-tree", "--name-only", "HEAD"], capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    def source(self, file: str) -> str:
        """Return a file as it was committed; SystemExit where the commit has none of that name."""
        done = subprocess.run(
            ["git", "-C", str(self.path), "show", f"HEAD:{file}"], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"error: {self.path} has no {file} at its HEAD. Is it a clone of another repository?")
        return done.stdout

    def module(self, file: str, name: str, stand_ins: Mapping[str, ModuleType] | None = None) -> ModuleType:
        """Execute a whole file as the module `name`, with stand-ins for modules that it imports."""
        made = ModuleType(name)
        code = compile(self.source(file), file, "exec")
        with imported_as({**(stand_ins or {}), name: made}):
            exec(code, vars(made))
        return made

    def definitions(self, file: str, names: Sequence[str], known: Mapping[str, object]) -> ModuleType:
        """Execute only some of a file's functions and classes; `known` is what they find in their module."""
        tree = ast.parse(self.source(file))
        wanted = [node for node in tree.body if getattr(node, "name", None) in names]
        if missing := set(names) - {getattr(node, "name", "") for node in wanted}:
            raise SystemExit(f"error: {file} at {self.commit} has no {', '.join(sorted(missing))}.")
        made = ModuleType(Path(file).stem)
        vars(made).update(known)
        exec(compile(ast.Module(body=wanted, type_ignores=[]), file, "exec"), vars(made))
        return made


@contextmanager
def imported_as(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    """Let imports find these modules, and take them away again."""
    hidden = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(hidden)


def stand_in(name: str, **content: object) -> ModuleType:
    """Return a module that holds only what is given."""
    made = ModuleType(name)
    vars(made).update(content)
    return made
