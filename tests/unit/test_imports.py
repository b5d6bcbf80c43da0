"""No module of the package imports itself by way of others, at its head or within a function."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "syncnorm"


def _modules(root: Path) -> dict[str, Path]:
    names = {path: path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py")}
    return {".".join(n.parts).removesuffix(".__init__"): path for path, n in names.items()}


def _imports(node: ast.AST) -> Iterator[str]:
    """The names that code imports, those for type checkers left out."""
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "relative imports are not resolved here"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child)


def _graph(root: Path) -> dict[str, set[str]]:
    """The modules of a package that each of them imports."""
    modules = _modules(root)
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        names = set(_imports(ast.parse(path.read_text())))
        # `from a import b` is an import of the module a.b, or of a, which defines b.
        found = {n if n in modules else n.rpartition(".")[0] for n in names}
        graph[name] = (found & modules.keys()) - {name}
    return graph


def _cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that import each other, directly or by way of others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        following = list(graph[start])
        while following:
            name = following.pop()
            if name not in seen:
                seen.add(name)
                following.extend(graph[name])
        reached[start] = seen
    cycles = {
        tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph if a in reached[a]
    }
    return sorted(list(cycle) for cycle in cycles)


def test_there_is_no_cycle():
    assert _cycles(_graph(PACKAGE)) == []


@pytest.mark.parametrize(
    ("a", "cycles"),
    [
        ("from p import b", [["p.a", "p.b"]]),
        ("def f():\n    from p.b import x", [["p.a", "p.b"]]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.b", []),
    ],
)
def test_a_cycle_is_found(tmp_path, a, cycles):
    for name, text in {"__init__": "", "a": a, "b": "import p.a"}.items():
        (tmp_path / "p" / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / "p" / f"{name}.py").write_text(text)
    assert _cycles(_graph(tmp_path / "p")) == cycles
