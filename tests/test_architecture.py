"""Who may import whom: the arrows of the design, enforced."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dlspark"

# Left may be imported by right. Modules of one layer may import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "_require", "_process", "timeouts"),
    ("store", "host_cache"),
    ("data",),
    ("job",),
    ("frames", "channel", "report_server", "guard", "checkpoint", "events"),
    ("progress", "watch", "monitor", "pulse"),
    ("mends", "session", "attach", "state", "callbacks", "loop", "worker", "_checks"),
    ("backend",),
    ("registry", "local"),
    ("spark", "preflight", "cluster"),
    ("runs", "handover", "trainer"),
    ("report",),
    ("hdf5_files", "keras_archives", "weights_files"),
    ("images", "optimizers", "model_files", "backbones", "models"),
    ("ml",),
    ("serve", "cli", "__main__"),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
# Heavy packages that only functions may import: loading a module of dlspark must load none of them.
LAZY = {"keras", "tensorflow", "jax", "torch", "pyspark", "horovod", "elephas", "spark_tensorflow_distributor", "sklearn"}
# Modules that exist to define a class of Keras', and are themselves imported lazily.
DEFINES_KERAS_CLASSES = {"dlspark/ml/views.py", "dlspark/optimizers.py", "dlspark/testing/toys.py"}
# Modules that exist to define classes of Spark ML's, or functions that it runs, and are themselves imported lazily.
_SPARK = ("classifier", "featurizer", "params", "persistence", "prepared_pipeline", "stage", "transformer", "udf")
DEFINES_SPARK_CLASSES = {f"dlspark/ml/{name}.py" for name in _SPARK}
# Modules of plug-ins that need their engine to define anything, and are themselves imported lazily.
LAZY_MODULES = {"runner.py", "master.py", "round.py", "asynchronous.py", "parameter_server.py"}
PLUGIN_MAY_IMPORT = {
    "backend", "worker", "mends", "job", "channel", "data", "store", "spark", "errors", "cluster", "monitor", "checkpoint",
    "callbacks", "state", "_process",
}  # fmt: skip
BUILDING_BLOCKS = sorted(path for path in PACKAGE.rglob("*.py") if "testing" not in path.parts)
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
PLUGINS = sorted(path for path in (ROOT / "backends").glob("*/dlspark_*/*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path, *, top_level_only: bool) -> set[str]:
    """Dotted names that a module imports, those under TYPE_CHECKING left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and top_level_only:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def layer_names(path: Path, *, top_level_only: bool = False) -> set[str]:
    """The first part below ``dlspark.`` of everything that a module imports of dlspark."""
    parts = (name.split(".") for name in imports(path, top_level_only=top_level_only))
    return {name[1] for name in parts if name[0] == "dlspark" and len(name) > 1}


@pytest.mark.parametrize("path", BUILDING_BLOCKS, ids=name_of)
def test_arrows_point_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return  # the public names, looked up on first use
    assert own in LAYER_OF, f"{own} has no place in the layers: put it into LAYERS"
    for other in layer_names(path):
        if other in LAYER_OF:
            assert LAYER_OF[other] <= LAYER_OF[own], f"{own} imports {other}, which lies above it"
        else:
            assert other != "testing", "only tests import dlspark.testing"


@pytest.mark.parametrize("path", [*BUILDING_BLOCKS, *PLUGINS], ids=name_of)
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    if name_of(path) in DEFINES_KERAS_CLASSES:
        return
    allowed = {"pyspark"} if name_of(path) in DEFINES_SPARK_CLASSES else set()
    heavy = {name.split(".")[0] for name in imports(path, top_level_only=True)} & LAZY - allowed
    module_is_lazy = path in PLUGINS and path.name in LAZY_MODULES
    assert not heavy or module_is_lazy, f"{name_of(path)} imports {heavy} when it is loaded"


@pytest.mark.parametrize("path", PLUGINS, ids=name_of)
def test_plugins_use_the_waist_only(path: Path) -> None:
    own = path.parent.name
    for name in imports(path, top_level_only=False):
        top, _, rest = name.partition(".")
        if top == "dlspark":
            assert rest.split(".")[0] in PLUGIN_MAY_IMPORT, f"{name_of(path)} imports {name}"
        if top.startswith("dlspark_"):
            assert top == own, f"{name_of(path)} imports another plug-in: {name}"


def test_the_framework_does_not_know_its_plugins() -> None:
    for path in PACKAGE.rglob("*.py"):
        tops = {name.split(".")[0] for name in imports(path, top_level_only=False)}
        assert not {top for top in tops if top.startswith("dlspark_")}, name_of(path)


@pytest.mark.parametrize("path", BENCHMARKS, ids=name_of)
def test_benchmarks_use_public_names(path: Path) -> None:
    import dlspark.ml

    public = {*(f"dlspark.{name}" for name in dlspark.__all__), "dlspark.spark.get_session"}
    public |= {f"dlspark.ml.{name}" for name in dlspark.ml.__all__}
    # Pages and tables are theirs as well as the command's; the mends serve the engines where they are measured without us.
    shared = ("dlspark.report.page.", "dlspark.cli.output.", "dlspark.mends.")
    for name in imports(path, top_level_only=False):
        if name.startswith("dlspark."):
            assert name in public or name.startswith(shared), f"{name_of(path)} imports {name}, which is not public"


def test_examples_use_public_names() -> None:
    import dlspark
    import dlspark.ml

    known = {*dlspark.__all__, *(f"ml.{name}" for name in dlspark.ml.__all__), "spark.get_session"}
    for path in sorted((ROOT / "examples").glob("*.py")):
        for name in imports(path, top_level_only=False):
            if name.startswith("dlspark."):
                assert name.removeprefix("dlspark.") in known, f"{path.name} imports {name}, which is not public"


def test_public_names_are_sorted_and_exist() -> None:
    import dlspark

    assert list(dlspark.__all__) == sorted(dlspark.__all__)
    for name in dlspark.__all__:
        assert getattr(dlspark, name) is not None
