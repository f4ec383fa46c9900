"""Data flows one way: every package imports only from itself and from earlier ones."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gateskip

SOURCE = Path(gateskip.__file__).parent
ORDER = (
    ("errors", "config", "registry", "costs", "data"),
    ("kernels",),
    ("gates",),
    ("retrofit",),
    ("skipping",),
    ("execution",),
    ("fitting",),
    ("calibration",),
    ("training",),
    ("decoding",),
    ("methods",),
    ("evaluation",),
    ("explain",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem in RANK)


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, package, module) of every import of gateskip, wherever it stands in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [node.module or ""]
            if node.module == "gateskip":
                # The public names are loaded lazily; what matters is where a submodule is meant.
                names = [f"gateskip.{a.name}" for a in node.names if a.name in RANK]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "gateskip" and len(parts) > 1:
                yield node.lineno, parts[1], name


def violations(path: Path) -> list[str]:
    own = package_of(path)
    wrong = []
    for line, package, module in imported(path):
        same_layer_elsewhere = (
            RANK[package] == RANK[own] and package != own and len(ORDER[RANK[own]]) == 2
        )
        if RANK[package] > RANK[own] or same_layer_elsewhere:
            wrong.append(f"{path.relative_to(SOURCE)}:{line} imports {module}")
    return wrong


def test_every_package_has_a_place() -> None:
    found = {package_of(path) for path in FILES}
    assert found <= RANK.keys(), found - RANK.keys()
    assert {"gates", "retrofit", "skipping", "execution"} <= found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_only_from_earlier_packages(path: Path) -> None:
    assert violations(path) == []


def test_top_level_modules_do_not_form_a_circle() -> None:
    order = {"errors": 0, "config": 1, "registry": 1, "costs": 2, "data": 2}
    for name, rank in order.items():
        for _, package, module in imported(SOURCE / f"{name}.py"):
            assert order[package] < rank, f"{name} imports {module}"


def test_the_check_finds_violations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "gates" / "bad.py"
    module.parent.mkdir()
    module.write_text("def f():\n    from gateskip.skipping.state import state_of\n")
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    assert violations(module) == ["gates/bad.py:2 imports gateskip.skipping.state"]
