"""Rooms of the package: which may import which, and one name for one class."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import nce_ext

PACKAGE = Path(nce_ext.__file__).parent

# A room is a folder or a file of the package. It imports only from floors below its own.
FLOORS = [
    {"_private_torch", "_tables", "_version", "_warnings", "reference"},
    {"_ops"},
    {"_checks"},
    {"noise", "utils"},
    {"_sampled", "contrastive", "density", "optim"},
    {"functional"},
    {"losses"},
    {"distributed", "evaluate"},
    {"__init__"},
    {"__main__"},
]


def module_name(path: Path) -> str:
    """Dotted, without the package's own name: "optim.rules", "optim" for its __init__.py, "__init__" at the top."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module and node.module.split(".")[0] == "nce_ext":
                parent = node.module.removeprefix("nce_ext").removeprefix(".")
                children = {f"{parent}.{alias.name}".removeprefix(".") for alias in node.names}
                found |= children & MODULES.keys() or {parent or "__init__"}
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            found |= {".".join(parts[1:]) or "__init__" for parts in names if parts[0] == "nce_ext"}
    return found


def test_no_room_imports_upward():
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    for name, path in MODULES.items():
        room = name.split(".")[0]
        assert room in floor, f"{name} has no floor"
        for other in imports(path):
            below = other.split(".")[0]
            assert below == room or floor[below] < floor[room], f"{name} imports {other}, which is not below it"


def test_no_modules_import_each_other_in_a_circle():
    below = {name: imports(path) for name, path in MODULES.items()}
    while below:
        free = {name for name, others in below.items() if not others & below.keys()}
        assert free, f"a circle among {sorted(below)}"
        below = {name: others for name, others in below.items() if name not in free}


def test_one_room_touches_the_operators():
    for name, path in MODULES.items():
        if name.split(".")[0] != "_ops":
            assert "torch.ops.nce_ext" not in path.read_text(), path.name


def test_no_two_classes_have_one_name():
    where = defaultdict(list)
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                where[node.name].append(name)
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}


def test_every_public_name_of_a_room_is_found_from_outside():
    """A folder's __init__.py names what its users import; the files below it are its own affair."""
    for room in ("contrastive", "distributed", "evaluate", "noise", "optim", "reference"):
        module = __import__(f"nce_ext.{room}", fromlist=["__all__"])
        assert module.__all__, room
        assert all(hasattr(module, name) for name in module.__all__), room
