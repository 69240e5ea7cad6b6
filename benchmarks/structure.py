"""How the code is laid out, in figures: rooms, arrows between them, imports, comments, names.

    python benchmarks/structure.py [--package latentvae] [--root FOLDER] [--json]

Everything is read from the syntax trees, so another checkout can be measured with --root.
"""

import argparse
import ast
import io
import json
import tokenize
from collections import defaultdict
from pathlib import Path

Arrows = dict[str, set[str]]
PUBLIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def modules(folder: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name; a folder's `__init__` is the folder itself."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str, known: dict[str, Path]) -> str:
    """An entry of the package: a module, or a folder with all below it.

    A folder that only holds other folders is a corridor: each of those is a room.
    """
    parts = module.split(".")
    entry = ".".join(parts[:2])
    direct = [
        name for name in known if name.rpartition(".")[0] == entry and known[name].name != "__init__.py"
    ]
    return entry if direct or len(parts) < 3 else ".".join(parts[:3])


def imported(tree: ast.AST, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a syntax tree imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names} & known.keys()
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                full = f"{node.module}.{name.name}"
                found |= {full if full in known else node.module} & known.keys()
    return found


def inside_functions(tree: ast.AST) -> int:
    """Import statements inside functions."""
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    places = {
        (node.lineno, node.col_offset)
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    return len(places)


def circles(arrows: Arrows) -> list[set[str]]:
    """Sets of rooms that reach each other."""
    reach = {room: reached_from(room, arrows) for room in arrows}
    found: list[set[str]] = []
    for room in arrows:
        circle = {other for other in reach[room] if room in reach.get(other, ())}
        if len(circle) > 1 and circle not in found:
            found.append(circle)
    return found


def reached_from(room: str, arrows: Arrows) -> set[str]:
    """Rooms that a room imports, at any distance."""
    seen: set[str] = set()
    ahead = [room]
    while ahead:
        for each in arrows.get(ahead.pop(), ()):
            if each not in seen:
                seen.add(each)
                ahead.append(each)
    return seen


def measure(folder: Path) -> dict[str, object]:
    """All figures of one package's folder."""
    known = modules(folder)
    lines = import_lines = comments = inner = 0
    homes: dict[str, set[str]] = defaultdict(set)
    arrows: Arrows = defaultdict(set)
    for name, path in known.items():
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        lines += len(text.splitlines())
        comments += sum(
            token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline)
        )
        inner += inside_functions(tree)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                import_lines += node.end_lineno - node.lineno + 1
        for node in tree.body:
            if isinstance(node, PUBLIC) and not node.name.startswith("_"):
                homes[node.name].add(name)
        room = room_of(name, known)
        arrows[room] |= {room_of(each, known) for each in imported(tree, known)} - {room}
    # the front door names everything lazily, which is no dependency of anybody's; corridors hold no code
    arrows = {
        room: others - {folder.name}
        for room, others in arrows.items()
        if room != folder.name and not any(other.startswith(f"{room}.") for other in arrows)
    }
    shared = {name: sorted(where) for name, where in homes.items() if len(where) > 1}
    return {
        "lines": lines,
        "files": len(known),
        "top_level_entries": sum(
            path.name != "__pycache__" and path.suffix in ("", ".py") for path in folder.iterdir()
        ),
        "imports_inside_functions": inner,
        "import_lines_percent": round(100 * import_lines / lines, 1),
        "public_names": len(homes),
        "public_names_in_several_modules_percent": round(100 * len(shared) / len(homes), 1),
        "comments_per_100_lines": round(100 * comments / lines, 1),
        "rooms": len(arrows),
        "arrows": sum(map(len, arrows.values())),
        "circles": [sorted(circle) for circle in circles(arrows)],
        "longest_file": max(len(path.read_text(encoding="utf-8").splitlines()) for path in known.values()),
        "names_in_several_modules": shared,
        "arrows_by_room": {room: sorted(others) for room, others in sorted(arrows.items())},
    }


def main() -> None:
    """Print the figures, as lines or as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", default="latentvae")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = measure(arguments.root / arguments.package)
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        if not isinstance(value, dict):
            print(f"{name:45} {value}")


if __name__ == "__main__":
    main()
