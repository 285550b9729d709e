"""main > landscape, trainer > utils.factory > models > models.parts > convs > data, utils: nothing imports upwards."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    ("main", 0),
    ("landscape", 1),
    ("trainer", 1),
    ("utils.factory", 2),
    ("utils.listing", 2),
    ("models.parts", 4),
    ("models", 3),
    ("convs", 5),
    ("data", 6),
    ("utils", 6),
]


def floor(module: str) -> int | None:
    return next((level for name, level in FLOORS if module == name or module.startswith(name + ".")), None)


def imports(path: Path):
    """Modules that a file imports at run time; `if TYPE_CHECKING:` blocks do not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_file_imports_a_higher_floor():
    wrong = []
    for path in [
        ROOT / "main.py",
        ROOT / "landscape.py",
        ROOT / "trainer.py",
        *(p for d in ("models", "convs", "data", "utils") for p in (ROOT / d).rglob("*.py")),
    ]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        own = floor(module)
        for other in imports(path):
            if (level := floor(other)) is not None and level < own:
                wrong.append(f"{module} imports {other}: a lower floor may not import a higher one")
    assert not wrong, "\n".join(wrong)
