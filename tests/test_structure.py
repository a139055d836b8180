"""The structure of the package, read from its imports: floors, no circles, files and classes of a size to read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import networkx
import pytest

import probe

REPOSITORY = Path(__file__).parents[1]

FLOORS = (
    "config files errors snapshot parameters shards estimand timing text digits terminal progress limits finite "
    "imports",
    "rollouts scoring distributed loading data from_checkpoint",
    "attribution verdict forecast estimators metrics demo",
    "phases",
    "module results",
    "logs runner",
    "report",
    "live",
    "callbacks",
    "offline",
    "sweep plan",
    "cli __main__",
)
"""The rooms of each floor, from the ground up; docs/architecture.md says what each is for."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
KNOWN_TO_THE_RUNNER = {("callbacks.base", "probe.module"), ("callbacks.base", "probe.runner")}
"""The one exception: the base class of the callbacks names these two for the type checker, and the runner knows it."""
BASE_CLASS = ("probe.runner", "callbacks.base")
FRONT_DOOR = ("probe.runner", "callbacks.defaults")
"""The other exception: a run that is given no callbacks takes the built-in ones, `probe.default_callbacks`."""
LONGEST_CALLBACK, LONGEST_CLASS, MOST_METHODS = 100, 200, 15


@dataclass(frozen=True)
class Import:
    """One import of a module of the package by another.

    Attributes:
        of: the module that imports.
        what: the module that is imported.
        typing: only for the type checker.
        inside: inside of a function.
    """

    of: str
    what: str
    typing: bool
    inside: bool

    @property
    def excepted(self) -> bool:
        """The exceptions that the structure has."""
        ends = (self.of, self.what)
        return (self.typing and ends in KNOWN_TO_THE_RUNNER) or ends == FRONT_DOOR


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name; the callbacks are a package beside it."""
    found = {}
    for folder in ("probe", "callbacks"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            if parts[:2] != ("probe", "callbacks"):  # a link to the other one
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


def _imported(node: ast.stmt, known: dict[str, Path]) -> set[str]:
    """The modules of the package that an import statement names."""
    if isinstance(node, ast.Import):
        names = {alias.name.replace("probe.callbacks", "callbacks") for alias in node.names}
        return names & set(known)
    if not isinstance(node, ast.ImportFrom):
        return set()
    assert node.level == 0, "expected an import by its whole name, found a relative one"
    assert node.module is not None
    base = node.module.replace("probe.callbacks", "callbacks")
    found = {f"{base}.{alias.name}" for alias in node.names} & set(known)
    whole = base in known and any(f"{base}.{alias.name}" not in known for alias in node.names)
    return found | ({base} if whole else set())


def _walk(node: ast.AST, typing: bool = False, inside: bool = False) -> Iterator[tuple[ast.stmt, bool, bool]]:
    """Every statement with whether it is for the type checker only, and inside of a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child, typing, inside
        within = inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        checked = typing or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        yield from _walk(child, checked, within)


def _through_the_front_door(path: Path) -> set[str]:
    """The modules whose names a file takes from the package itself, `probe.NAME`, where it imports that."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "probe"
    }
    direct = any(
        isinstance(node, ast.Import) and any(alias.name == "probe" for alias in node.names)
        for node in ast.walk(tree)
    )
    homes = {probe._HOME[name].replace("probe.callbacks", "callbacks") for name in names & set(probe._HOME)}
    return homes if direct else set()


@cache
def imports() -> tuple[Import, ...]:
    """Every import of one module by another; the front door `probe/__init__.py` hands on names of all floors."""
    known, found = modules(), set()
    for name, path in known.items():
        if name == "probe":
            continue
        for node, typing, inside in _walk(ast.parse(path.read_text(encoding="utf-8"))):
            found |= {
                Import(name, what, typing, inside)
                for what in _imported(node, known)
                if what not in (name, "probe")
            }
        for home in _through_the_front_door(path):
            found.add(Import(name, home, typing=False, inside=True))
    return tuple(sorted(found, key=lambda one: (one.of, one.what)))


def room(module: str) -> str:
    """The room of a module: the package or the file directly under `probe`."""
    parts = module.split(".")
    return parts[0] if parts[0] == "callbacks" else parts[1]


def _circles(pairs: set[tuple[str, str]]) -> list[list[str]]:
    graph = networkx.DiGraph(sorted(pairs))
    return [sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1]


def test_every_room_has_a_floor():
    """A new file or folder directly under the package is given its place."""
    rooms = {room(name) for name in modules() if name != "probe"}
    assert rooms == set(FLOOR)


def test_no_file_imports_itself_in_a_circle():
    """Imports inside of functions and for the type checker count."""
    assert _circles({(one.of, one.what) for one in imports() if not one.excepted}) == []


def test_no_room_imports_itself_in_a_circle():
    """The rooms of one floor stand in an order as well."""
    pairs = {
        (room(one.of), room(one.what))
        for one in imports()
        if not one.excepted and (one.of, one.what) != BASE_CLASS
    }
    assert _circles({(a, b) for a, b in pairs if a != b}) == []


def test_no_import_runs_upward():
    """A file imports from its own floor or from those below."""
    upward = [
        f"{one.of} -> {one.what}"
        for one in imports()
        if FLOOR[room(one.of)] < FLOOR[room(one.what)]
        and not one.excepted
        and (one.of, one.what) != BASE_CLASS
    ]
    assert upward == []


def test_imports_stand_at_the_top():
    """None stands inside of a function."""
    inside = [f"{one.of} -> {one.what}" for one in imports() if one.inside and not one.excepted]
    assert inside == []


def test_training_imports_no_callbacks():
    """The drop-in probe works without the callbacks' package."""
    assert [one.of for one in imports() if room(one.of) == "live" and room(one.what) == "callbacks"] == []


@pytest.mark.parametrize("name", sorted(name for name in modules() if room(f"{name}.") == "callbacks"))
def test_callbacks_are_thin(name: str):
    """A callback says when; what is done stands elsewhere."""
    assert len(modules()[name].read_text(encoding="utf-8").splitlines()) <= LONGEST_CALLBACK


def _does_nothing(method: ast.FunctionDef) -> bool:
    """Whether a method is a hook for others to fill: a docstring, and no more."""
    return len(method.body) == 1 and isinstance(method.body[0], ast.Expr)


def _sets(method: ast.FunctionDef) -> bool:
    """Whether it is the other half of a property that one has read already."""
    return any(isinstance(one, ast.Attribute) and one.attr == "setter" for one in method.decorator_list)


@pytest.mark.parametrize("name", sorted(modules()))
def test_classes_can_be_read(name: str):
    """No class has more lines or methods than one reads in one go; hooks that do nothing do not count."""
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            methods = [
                part
                for part in node.body
                if isinstance(part, ast.FunctionDef) and not (_does_nothing(part) or _sets(part))
            ]
            assert (node.end_lineno or 0) - node.lineno + 1 <= LONGEST_CLASS, node.name
            assert len(methods) <= MOST_METHODS, node.name
