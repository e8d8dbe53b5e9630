"""The drawing of what is built on what: each row of boxes imports only from the rows below it.

python docs/hooks/architecture.py    writes docs/assets/architecture.svg

That it is so is tested, import by import (``upward``).
"""

import ast
import html
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).resolve().parents[2]
DRAWING = ROOT / "docs" / "assets" / "architecture.svg"

# Rows from the top; each box has a title, a package, and its modules, the least specific last.
ROWS: tuple[tuple[tuple[str, str, str], ...], ...] = (
    (("every theorem, every mistake", "verification", ""),),
    (("model families", "diffusion_envs", "sd15 cifar10 tiny words"),),
    (("what surrounds the updates", "diffusion_envs", "runs"),),
    (("trainer and optimisers", "diffusion_envs", "training"),),
    (
        ("methods", "diffusion_envs", "objectives"),
        ("problems with known optima", "diffusion_envs", "exact"),
    ),
    (("the score as an action", "diffusion_envs", "environment rollout preferences"),),
    (
        ("networks as policies", "diffusion_envs", "models"),
        ("steps of a chain", "diffusion_envs", "samplers"),
        ("rewards", "diffusion_envs", "rewards"),
        ("best reward at a KL", "diffusion_envs", "frontier"),
    ),
    (
        (
            "noise levels, and files that are whole",
            "diffusion_envs",
            "noise_schedules denoising prompt ranges digests whole_files training.phase "
            "training.memory training.sharded cifar10.data cifar10.formats cifar10.plain_pickle "
            "cifar10.pictures",
        ),
    ),
    (("ready to use", "ctrl", "agents problems pendulum gym plots"),),
    (
        ("grids", "ctrl", "hjb bellman markov_chain wide_stencil state_grid action_grid"),
        (
            "further laws and criteria",
            "ctrl",
            "regimes phibe risk_sensitive chains mean_field adjoint_matching",
        ),
    ),
    (
        (
            "theorems on paths",
            "ctrl",
            "girsanov transitions value martingale q_learning policy_gradient trust_region "
            "advantages off_policy",
        ),
        ("exact answers", "ctrl", "linear"),
    ),
    (
        (
            "problems and paths",
            "ctrl",
            "sde problem policy squashed_policy memory exploration jumps stopping paths returns "
            "recorded noise simulate solvers torchsde_solver estimate user_functions devices "
            "reused_memory compiled_normals counter_normals drawn_ahead noise_sources "
            "time_homogeneity",
        ),
    ),
)
_COLOURS = {"ctrl": "#3f7fbf", "diffusion_envs": "#b5652b", "verification": "#5b8f4a"}
_WIDE, _GAP, _LINE, _LETTER = 920, 12, 16, 6.7


def owners() -> dict[str, tuple[int, int]]:
    """Module or package -> the row and the place of its box."""
    return {
        f"{package}.{name}".rstrip("."): (row, place)
        for row, boxes in enumerate(ROWS)
        for place, (_, package, names) in enumerate(boxes)
        for name in (names.split() or [""])
    }


def box_of(name: str, owner: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    """The box of a dotted name: that of the longest part of it which has one."""
    while name and name not in owner:
        name = name.rpartition(".")[0]
    return owner.get(name)


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def upward() -> set[tuple[str, str]]:
    """Imports that the drawing denies: of a row above, or of another box in the same row."""
    owner, found = owners(), set[tuple[str, str]]()
    for package in _COLOURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            module = module.removesuffix(".__init__")
            here = box_of(module, owner)
            for name in imported(path):
                there = box_of(name, owner)
                if here and there and here != there and there[0] <= here[0]:
                    found.add((module, name))
    return found


def drawing() -> str:
    """The SVG; its colours read on light and on dark pages."""
    parts, y = [], 4
    for boxes in ROWS:
        weights = [max(len(names), len(title) + len(package)) for title, package, names in boxes]
        weights = [max(w, 22) for w in weights]
        free = _WIDE - _GAP * (len(boxes) - 1)
        widths = [free * w / sum(weights) for w in weights]
        lines = [
            wrap(names, int((wide - 24) / _LETTER))
            for (_, _, names), wide in zip(boxes, widths, strict=True)
        ]
        high = 30 + _LINE * max(len(each) for each in lines)
        x = 40.0
        for (title, package, _), wide, each in zip(boxes, widths, lines, strict=True):
            colour = _COLOURS[package]
            parts.append(
                f'<rect x="{x:.0f}" y="{y}" width="{wide:.0f}" height="{high}" rx="5" '
                f'fill="{colour}" fill-opacity=".12" stroke="{colour}"/>'
                f'<text x="{x + 12:.0f}" y="{y + 20}" fill="{colour}" font-weight="bold">'
                f"{html.escape(title)}</text>"
            )
            for k, line in enumerate(each):
                parts.append(
                    f'<text x="{x + 12:.0f}" y="{y + 38 + k * _LINE}" fill="#8a8a8a" '
                    f'font-family="ui-monospace, monospace" font-size="11">{line}</text>'
                )
            x += wide + _GAP
        y += high + _GAP
    arrow = (
        f'<path d="M18 10V{y - 22}" stroke="#8a8a8a" stroke-width="2"/>'
        f'<path d="M12 {y - 26}l6 12l6 -12z" fill="#8a8a8a"/>'
    )
    legend = []
    for k, (package, colour) in enumerate(_COLOURS.items()):
        legend.append(
            f'<text x="{40 + 150 * k}" y="{y + 14}" fill="{colour}" font-weight="bold">'
            f"{package}</text>"
        )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE + 44} {y + 24}" '
        'font-family="system-ui, sans-serif" font-size="13">'
    )
    return "\n".join([head, arrow, *parts, *legend, "</svg>", ""])


if __name__ == "__main__":
    DRAWING.write_text(drawing())
