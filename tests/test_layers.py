"""The order of the modules, and what may be imported where and when."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import embedkit

ROOT = Path(embedkit.__file__).parent
# Imports run from later to earlier. Names on one line may import each other; packages stand for all within,
# and {learning, serving, report} never import each other: they meet at tables.
LAYERS = [
    ["errors"],
    ["frames", "roles"],
    ["vocabulary"],
    ["columns", "crosses", "tables"],
    ["layout", "store"],
    ["changes", "folds"],
    ["learning", "serving", "report"],
    ["worst", "models"],
    ["pilot"],
    ["cross_fitting"],
    ["archive", "inputs", "lookup", "base", "encoder", "predictors"],
    ["comparison", "verdict", "evaluation", "files", "places"],
    ["demo"],
    ["console"],
    ["cli_options"],
    ["cli"],
    ["__main__"],
]
APART = {"learning", "serving", "report"}
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# The store behind a set, and the network behind an estimator, are looked up when `save` or `load` is called.
LAZY_UPWARD = {("tables", "store")}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room(path: Path) -> str:
    """Module or package directly below embedkit that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def required(node: ast.AST) -> str | None:
    """The module that a call of `embedkit.errors.require` imports."""
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require"
    return node.args[0].value if is_call and isinstance(node.args[0], ast.Constant) else None


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Names of imported modules, and whether when the module is loaded; not those for type hints only."""

    def walk(node: ast.AST, at_load: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((name.name, at_load) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module, at_load
            if node.module == "embedkit" or node.module in PACKAGES:
                yield from ((f"{node.module}.{name.name}", at_load) for name in node.names)
        elif isinstance(node, ast.Expr) and required(node.value):
            return  # only asks whether it is there
        elif name := required(node):
            yield name, at_load
        elif not is_type_checking(node):
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                yield from walk(child, at_load and not inside)

    return walk(ast.parse(source), True)


PACKAGES = {f"embedkit.{name}" for name in APART}


def wrong_edges(importer: str, source: str) -> list[str]:
    """Imports of a module's source that run the wrong way."""
    found = []
    for name, at_load in imports(source):
        parts = name.split(".")
        if parts[0] != "embedkit" or len(parts) == 1 or parts[1] not in RANK or parts[1] == importer:
            continue
        apart = importer in APART and parts[1] in APART
        lazy = (importer, parts[1]) in LAZY_UPWARD and not at_load
        if apart or (RANK[parts[1]] > RANK[importer] and not lazy):
            found.append(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    assert room(path) in RANK, "a new module needs a place in LAYERS"
    assert wrong_edges(room(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("frames", "import embedkit.tables"),
        ("tables", "from embedkit.store import load"),
        ("tables", "from embedkit import store"),
        ("serving", "def f():\n    from embedkit.learning.fit import learn"),
        ("report", "from embedkit.serving import batch"),
        ("store", "if True:\n    import embedkit.cli"),
    ],
)
def test_an_edge_that_runs_the_wrong_way_is_seen(importer: str, source: str) -> None:
    assert wrong_edges(importer, source)


@pytest.mark.parametrize(
    ("module", "where"),
    [
        ("torch", "learning/"),
        ("safetensors", ("archive.py", "files.py", "learning/")),
        ("matplotlib", "report/"),
        ("click", ("cli.py", "cli_options.py", "console.py")),
        ("pickle", None),
        ("joblib", None),
        ("shelve", None),
        ("marshal", None),
    ],
)
def test_heavy_and_unsafe_modules_stay_where_they_belong(module: str, where: str | tuple | None) -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in MODULES
        if any(name.split(".")[0] == module for name, _ in imports(path.read_text()))
    }
    assert all(where is not None and name.startswith(where) for name in found), found


def test_nothing_evaluates_text_or_unpickles() -> None:
    unsafe = re.compile(r"(?<![.\w])(eval|exec)\(|torch\.load\(|allow_pickle=True")
    assert [path.name for path in MODULES if unsafe.search(path.read_text())] == []


def run_python(code: str, *arguments: object) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_stored_set_transforms_without_torch_bit_for_bit(
    stored: Path, shops: pa.Table, regressor: embedkit.EntityEmbeddingRegressor, tmp_path: Path
) -> None:
    strange = pa.table(
        {"shop": [99, None], "town": ["Kyiv", None], "open": [None, True], "distance": [None, 2.0]}
    )
    rows = pa.concat_tables([shops.drop_columns("sales"), strange], promote_options="permissive")
    pq.write_table(rows, tmp_path / "rows.parquet")
    code = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "safetensors", "matplotlib", "lightgbm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Without())
import pyarrow.parquet as pq, embedkit
rows = pq.read_table(sys.argv[2])
found = embedkit.EmbeddingSet.load(sys.argv[1]).transform(rows)
print(*sorted({"torch", "sklearn", "scipy"} & set(sys.modules)))
encoder = embedkit.PretrainedEmbeddingEncoder(sys.argv[1]).fit(rows)
assert encoder.transform(rows).tobytes() == found.tobytes()
import numpy as np
np.save(sys.argv[3], found)
"""
    loaded = run_python(code, stored, tmp_path / "rows.parquet", tmp_path / "found.npy").split()
    assert loaded == [], "the lookup alone needs none of these"
    found, expected = np.load(tmp_path / "found.npy"), regressor.transform(rows)
    assert found.dtype == expected.dtype == np.float32
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "code", ["import embedkit", "from embedkit.cli import main; main(['--help'], standalone_mode=False)"]
)
def test_start_is_light(code: str) -> None:
    loaded = set(run_python(f"{code}; import sys; print(*sys.modules)").split())
    assert "embedkit" in loaded
    assert not loaded & {"torch", "pandas", "numpy", "pyarrow", "sklearn", "matplotlib", "lightgbm"}
