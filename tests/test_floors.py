"""Nothing imports upwards, and every source file has its test file."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [  # the first entry that fits counts
    ("main", 0),
    ("tools", 1),
    ("trainer", 1),
    ("predictor", 1),
    ("models.factory", 2),
    ("models.parts", 4),
    ("models", 3),
    ("convs", 5),
    ("data", 6),
    ("utils", 7),
]
# `main` reads the names of the commands, which `tools/__init__.py` finds without importing anything.
SOURCES = [ROOT / f"{name}.py" for name in ("main", "trainer", "predictor")]
FOLDERS = ("tools", "models", "convs", "data", "utils")


def sources() -> list[Path]:
    return [*SOURCES, *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]


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
    for path in sources():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        own = floor(module)
        for other in imports(path):
            if (level := floor(other)) is not None and level < own:
                wrong.append(f"{module} imports {other}: a lower floor may not import a higher one")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_long():
    """A learner reads on two screens, everything else on three."""
    learners = {path for path in (ROOT / "models").rglob("*.py") if "register(" in path.read_text()}
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in sources()
        if (lines := path.read_text().count("\n")) > (250 if path in learners else 400)
    ]
    assert not long, "\n".join(long)
