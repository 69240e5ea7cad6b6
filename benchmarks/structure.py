"""How the code is laid out, in figures: rooms, arrows between them, imports, comments, names.

    python benchmarks/structure.py [--package latentvae] [--root FOLDER] [--json] [--picture FILE]

Everything is read from the syntax trees, so another checkout can be measured with --root. `--picture` draws
the rooms, each above all that it imports: docs/architecture.png.
"""

import argparse
import ast
import io
import json
import random
import re
import textwrap
import tokenize
from collections import defaultdict
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

Arrows = dict[str, set[str]]
Shaft = tuple[str, str, int]  # where the arrow between two rooms passes a layer that lies between them
Node = str | Shaft
Layers = list[list[Node]]  # from below
Link = tuple[Node, Node]  # on neighbouring floors
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


# --- the picture

WIDTH, PITCH, HEIGHT = 12.5, 1.3, 0.88  # inches: of the house, from floor to floor, of a room
SHAFT, WALL = 0.16, 0.18  # widths of a shaft, and of what is between rooms
APART = 0.3  # between arrows that enter one room
LINES = 3  # of text in a room
STARTS = 24  # of the search for an order
COLOURS = (  # fill and edge of each floor, from below
    *(("#e4e8ee", "#8b95a5"), ("#d6e6f5", "#6f9cc4"), ("#bfd9f5", "#3f78bd"), ("#cdebdd", "#4e9c78")),
    *(("#fbeecb", "#c09a35"), ("#fadfcf", "#c77b4e"), ("#e9dff3", "#8a68ad")),
)


def necessary(arrows: Arrows) -> Arrows:
    """The arrows that do not follow from others: without the rest, the same rooms are reached."""
    return {
        room: {each for each in others if not any(each in reached_from(way, arrows) for way in others)}
        for room, others in arrows.items()
    }


def floor_of(room: str, arrows: Arrows) -> int:
    """One above the highest room that it imports."""
    return 1 + max((floor_of(each, arrows) for each in arrows[room]), default=-1)


def ways(arrows: Arrows) -> list[list[Node]]:
    """Each arrow as what it touches on every floor, from the top: a room, shafts, a room."""
    floors = {room: floor_of(room, arrows) for room in arrows}
    return [
        [room, *((room, other, floor) for floor in range(floors[room] - 1, floors[other], -1)), other]
        for room in sorted(arrows)
        for other in sorted(arrows[room])
    ]


def extents(layers: Layers) -> dict[Node, tuple[float, float]]:
    """From where to where each node goes: the rooms of a floor share its width."""
    found: dict[Node, tuple[float, float]] = {}
    for layer in layers:
        rooms = sum(isinstance(node, str) for node in layer)
        width = (WIDTH - WALL * (len(layer) - 1) - SHAFT * (len(layer) - rooms)) / max(rooms, 1)
        left = 0.0
        for node in layer:
            found[node] = (left, left + (width if isinstance(node, str) else SHAFT))
            left = found[node][1] + WALL
    return found


def lines(where: dict[Node, tuple[float, float]], links: list[Link]) -> dict[Link, tuple[float, float]]:
    """Where each arrow leaves one node and enters the next: straight down if it can, no two at one place."""
    found = {}
    for above, below in links:
        narrow = min(where[above], where[below], key=lambda place: place[1] - place[0])
        middle = sum(narrow) / 2
        found[above, below] = [
            min(max(middle, left + 0.08), right - 0.08) for left, right in (where[above], where[below])
        ]
    for node, (left, right) in where.items():
        arriving = sorted((link for link in links if link[1] == node), key=lambda link: found[link][::-1])
        for order, step in ((arriving[::-1], -APART), (arriving, APART)):
            limit, push = (right - 0.25, min) if step < 0 else (left + 0.25, max)
            for link in order if len(order) > 1 else ():
                found[link][1] = push(found[link][1], limit)
                limit = found[link][1] + step
    return {link: (start, end) for link, (start, end) in found.items()}


def untidiness(layers: Layers, links: list[Link]) -> float:
    """How far arrows go sideways, in inches; one that crosses another costs a foot."""
    drawn = lines(extents(layers), links)
    floors = {node: number for number, layer in enumerate(layers) for node in layer}
    crossings = sum(
        floors[one[0]] == floors[other[0]]
        and (drawn[one][0] - drawn[other][0]) * (drawn[one][1] - drawn[other][1]) < 0
        for one, other in combinations(links, 2)
    )
    return sum(abs(start - end) for start, end in drawn.values()) + 12 * crossings


def tidied(layers: Layers, links: list[Link]) -> Layers:
    """The floors with rooms and shafts swapped as long as that tidies, the best from several starts."""
    best, draws = layers, random.Random(0)
    for _ in range(STARTS):
        now = [draws.sample(layer, len(layer)) for layer in layers]
        least, before = untidiness(now, links), float("inf")
        while least < before:
            before = least
            for layer in now:
                for one, other in combinations(range(len(layer)), 2):
                    layer[one], layer[other] = layer[other], layer[one]
                    cost = untidiness(now, links)
                    if cost < least:
                        least = cost
                    else:  # back
                        layer[one], layer[other] = layer[other], layer[one]
        if least < untidiness(best, links):
            best = now
    return best


def draw(arrows: Arrows, known: dict[str, Path], file: Path) -> None:
    """Draw each room with the first sentence of its `__init__`, and the necessary arrows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    few = ways(necessary(arrows))
    layers: Layers = [[] for _ in range(1 + max(floor_of(room, arrows) for room in arrows))]
    for room in sorted(arrows):
        layers[floor_of(room, arrows)].append(room)
    for shaft in sorted({node for way in few for node in way[1:-1] if not isinstance(node, str)}):
        layers[shaft[2]].append(shaft)
    links = sorted({link for way in few for link in pairwise(way)}, key=str)
    layers = tidied(layers, links)
    where = extents(layers)
    drawn = lines(where, links)
    figure = pyplot.figure(figsize=(WIDTH + 0.4, PITCH * len(layers) + 0.1))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.2, WIDTH + 0.2), ylim=(-0.8, PITCH * len(layers) - 0.7))
    axes.axis("off")
    floors = {node: number for number, layer in enumerate(layers) for node in layer}
    for room in arrows:
        draw_room(axes, room, known[room], where[room], floors[room])
    for way in few:
        draw_arrow(axes, [drawn[link] for link in pairwise(way)], floors[way[0]])
    total = sum(map(len, arrows.values()))
    axes.text(
        *(0, -0.62),
        f"An arrow points to what is imported. Drawn: {len(few)} of {total}; the others follow from these.",
        **{"size": 8.5, "color": "#66717d", "va": "center"},
    )
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def draw_room(axes: Any, room: str, path: Path, place: tuple[float, float], floor: int) -> None:
    """A box with the room's name and what it is."""
    from matplotlib.patches import FancyBboxPatch

    fill, edge = COLOURS[floor % len(COLOURS)]
    corner, width = (place[0], floor * PITCH - HEIGHT / 2), place[1] - place[0]
    style = {"boxstyle": "round,pad=0,rounding_size=0.09", "facecolor": fill, "edgecolor": edge}
    axes.add_patch(FancyBboxPatch(corner, width, HEIGHT, linewidth=1.3, **style))
    summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    about = re.split(r"[.;] |\.$", summary.replace("\n", " "))[0]
    if len(textwrap.wrap(about, int(width * 14))) > LINES:
        about = about.partition(":")[0]
    middle, height = sum(place) / 2, floor * PITCH
    centred = {"ha": "center", "va": "center"}
    name = room.rpartition(".")[2]
    within = room.split(".")[1:-1]
    axes.text(middle, height + 0.24, name, size=12, weight="bold", color="#22303f", **centred)
    if within:  # a room of a corridor
        axes.text(place[0] + 0.1, height + 0.33, within[0], size=7.5, color=edge, va="center")
    axes.text(
        middle,
        height - 0.14,
        "\n".join(textwrap.wrap(about, int(width * 14))),
        size=8.5,
        color="#414d5a",
        linespacing=1.2,
        **centred,
    )


def draw_arrow(axes: Any, parts: list[tuple[float, float]], floor: int) -> None:
    """A line down from room to room, upright where it leaves, through each shaft, and where it arrives."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Line

    points: list[tuple[float, float]] = []
    codes: list[int] = []
    for down, (start, end) in enumerate(parts):
        top, bottom = (floor - down) * PITCH - HEIGHT / 2, (floor - down - 1) * PITCH + HEIGHT / 2
        middle = (top + bottom) / 2
        points += [(start, top), (start, middle), (end, middle), (end, bottom)]
        codes += [Line.LINETO if codes else Line.MOVETO, Line.CURVE4, Line.CURVE4, Line.CURVE4]
    style = {"arrowstyle": "-|>,head_length=5,head_width=2.6", "color": "#5a6675", "linewidth": 1.2}
    axes.add_patch(FancyArrowPatch(path=Line(points, codes), shrinkA=0, shrinkB=1, **style))


def main() -> None:
    """Print the figures, as lines or as JSON, or draw the rooms."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", default="latentvae")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    figures = measure(arguments.root / arguments.package)
    if arguments.picture:
        arrows = {room: set(others) for room, others in figures["arrows_by_room"].items()}
        return draw(arrows, modules(arguments.root / arguments.package), arguments.picture)
    if arguments.json:
        return print(json.dumps(figures, indent=1))
    for name, value in figures.items():
        if not isinstance(value, dict):
            print(f"{name:45} {value}")


if __name__ == "__main__":
    main()
