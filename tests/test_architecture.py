"""Who may import whom: the arrows of the design, enforced."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dlspark"

# A room (or a module at the top) may import only those in the rows below its own.
ARROWS = """
    cli  testing  serving  __main__
    study
    ml
    trainer
    registry  local  plugin
    backend  evaluation
    driver  images
    spark
    worker
    job
    models
    model_files  data  report
    wire  storage  timeouts
    _require
    errors  mends
"""
ROW_OF = {name: row for row, names in enumerate(reversed(ARROWS.split("\n"))) for name in names.split()}
APART = {("driver", "worker")}  # they communicate through job, wire, storage and data
MODULES_AT_THE_TOP = 11
# Rooms that other rooms import through their ``__init__``. That of ml has only public names, and each mend stands alone.
CLOSED = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"cli", "mends", "ml"}
# Heavy packages that only functions may import: loading a module of dlspark must load none of them.
LAZY = {"keras", "tensorflow", "jax", "torch", "pyspark", "horovod", "elephas", "spark_tensorflow_distributor", "sklearn"}
# Modules that define a Keras class and are imported lazily.
DEFINES_KERAS_CLASSES = {"dlspark/ml/views.py", "dlspark/models/optimizers.py", "dlspark/testing/toys.py"}
# Modules that define Spark ML classes, or functions that Spark ML runs, and are imported lazily.
_SPARK = ("classifier", "featurizer", "params", "persistence", "prepared_pipeline", "stage", "transformer", "udf")
DEFINES_SPARK_CLASSES = {f"dlspark/ml/{name}.py" for name in _SPARK}
# Modules of plug-ins that import their engine on loading and are imported lazily.
LAZY_MODULES = {"runner.py", "master.py", "round.py", "asynchronous.py", "parameter_server.py"}
MODULES = sorted(PACKAGE.rglob("*.py"))
BUILDING_BLOCKS = [path for path in MODULES if "testing" not in path.parts]
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
PLUGINS = sorted(path for path in (ROOT / "backends").glob("*/dlspark_*/*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names that a module imports; with ``top_level_only``, those that loading it imports."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if top_level_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def modules_imported(own: str, path: Path, known: set[str]) -> set[str]:
    """The modules of ``known`` that a module imports anywhere. A name in a module counts as that module."""
    found = set()
    for name in imports(path):
        while name and name not in known:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", own}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The first circle found from each node, if any."""
    done: set[str] = set()
    found: list[list[str]] = []

    def walk(node: str, above: list[str]) -> None:
        if node in above:
            found.append([*above[above.index(node) :], node])
        elif node not in done:
            for other in sorted(graph.get(node, ())):
                walk(other, [*above, node])
            done.add(node)

    for node in sorted(graph):
        walk(node, [])
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_point_down(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return  # the public names, looked up on first use
    assert own in ROW_OF, f"{own} has no place in the arrows: put it into ARROWS"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "dlspark" or parts[1] == own:
            continue
        other = parts[1]
        if other in ROW_OF:
            assert ROW_OF[other] < ROW_OF[own] or own == "__main__", f"{own} imports {other}, which does not lie below it"
            assert (own, other) not in APART, f"{own} imports {other}"
            if other in CLOSED and own != "testing" and name != "dlspark.models.optimizers.DepthDecayAdam":
                assert not (PACKAGE / other / f"{parts[2]}.py").exists() or len(parts) == 3, (
                    f"{name_of(path)} imports {name}: import it from dlspark.{other}, whose __init__ has what others use"
                )
        else:
            assert own == "testing", f"{name_of(path)} imports {name}: name its home"


def test_nothing_imports_in_a_circle() -> None:
    roots = [ROOT, *(ROOT / "backends").iterdir(), ROOT / "benchmarks"]
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for root in roots
        for path in root.glob("dlspark*/**/*.py")
    }
    graph = {name: modules_imported(name, path, set(files)) for name, path in files.items()}
    assert not circles(graph)


def test_few_modules_at_the_top() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MODULES_AT_THE_TOP


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
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "dlspark":
            assert rest.split(".")[0] == "plugin", f"{name_of(path)} imports {name}: a plug-in imports dlspark.plugin only"
        if top.startswith("dlspark_"):
            assert top == own, f"{name_of(path)} imports another plug-in: {name}"


def test_the_framework_does_not_know_its_plugins() -> None:
    for path in PACKAGE.rglob("*.py"):
        tops = {name.split(".")[0] for name in imports(path)}
        assert not {top for top in tops if top.startswith("dlspark_")}, name_of(path)


@pytest.mark.parametrize("path", BENCHMARKS, ids=name_of)
def test_benchmarks_use_public_names(path: Path) -> None:
    import dlspark.ml

    public = {*(f"dlspark.{name}" for name in dlspark.__all__), "dlspark.spark.get_session"}
    public |= {f"dlspark.ml.{name}" for name in dlspark.ml.__all__}
    # Benchmarks share the command's pages, tables and arguments; the mends serve engines that are measured without dlspark.
    shared = ("dlspark.report.", "dlspark.cli.arguments.", "dlspark.cli.output.", "dlspark.mends.")
    for name in imports(path):
        if name.startswith("dlspark."):
            assert name in public or name.startswith(shared), f"{name_of(path)} imports {name}, which is not public"


def test_examples_use_public_names() -> None:
    import dlspark
    import dlspark.ml

    known = {*dlspark.__all__, *(f"ml.{name}" for name in dlspark.ml.__all__), "spark.get_session"}
    for path in sorted((ROOT / "examples").glob("*.py")):
        for name in imports(path):
            if name.startswith("dlspark."):
                assert name.removeprefix("dlspark.") in known, f"{path.name} imports {name}, which is not public"


def test_public_names_are_sorted_and_exist() -> None:
    import dlspark

    assert list(dlspark.__all__) == sorted(dlspark.__all__)
    for name in dlspark.__all__:
        assert getattr(dlspark, name) is not None
