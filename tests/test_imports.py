"""Imports point down the house, and optional packages are imported late."""

import ast
import graphlib
from pathlib import Path

import pytest

import experiments

PACKAGE = Path(__file__).parents[1] / "advjax"

FLOORS = [  # from the top down; rooms of one floor do not import each other
    {"plots"},
    {"runner"},
    {"training"},
    {"lipschitz"},
    {"transfer"},
    {"units"},
    {"attacks"},
    {"solvers"},
    {"models"},
    {"data"},
    {"metrics"},
    {"losses"},
    {"checks"},
    {"files", "functions", "jaxprs", "progress", "sharding", "types"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

OPTIONAL = {"matplotlib", "tqdm", "tensorflow_datasets", "PIL"}
LATE = {"advjax.data.tfds_mnist"}  # imports optional packages, and so must be imported late


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
ROOMED = {name: path for name, path in MODULES.items() if name != "advjax"}


def imports(path, *, at_import_time=False):
    """The dotted names that a file imports.

    `from a import b` counts as a.b, and also as a unless b is a module.
    """
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names
            if not names <= MODULES.keys() | COMMON.keys():
                yield node.module
        elif at_import_time and (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ):
            continue
        nodes.extend(ast.iter_child_nodes(node))


WINGS = {"linear": "jaxpr", "jaxpr": "linear"}  # of advjax.lipschitz, joined by bound.py
CERTIFIED = {"rounding", "spectral_norm", "frequencies", "lipsdp", "layers"}


@pytest.mark.parametrize("name", [n for n in ROOMED if n.startswith("advjax.lipschitz.")])
def test_the_wings_of_lipschitz_import_neither_each_other_nor_what_is_above(name):
    wing, _, module = name.removeprefix("advjax.lipschitz.").partition(".")
    for imported in imports(ROOMED[name]):
        other = imported.removeprefix("advjax.lipschitz.").split(".")[0]
        if wing in WINGS and imported.startswith("advjax.lipschitz"):
            assert other == wing, f"{name} imports {imported}"
        if module in CERTIFIED:  # certified bounds take nothing from the estimates from below
            assert not imported.endswith("lanczos"), f"{name} imports {imported}"


def test_every_module_has_a_room():
    rooms = {name.split(".")[1] for name in ROOMED}
    assert rooms <= FLOOR.keys(), "add the new room to FLOORS, at its place"


@pytest.mark.parametrize("name", ROOMED)
def test_imports_point_down(name):
    room = name.split(".")[1]
    for imported in imports(ROOMED[name]):
        if imported == "experiments" or imported.startswith("experiments."):
            pytest.fail(f"{name} imports {imported}")
        if imported.split(".")[0] == "advjax":
            # `from advjax import losses` is in order, the library's re-exports are not.
            other = imported.split(".")[1] if "." in imported else room
            below = other in FLOOR and FLOOR[other] > FLOOR[room]
            assert other == room or below, f"{name} imports {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_optional_packages_are_imported_late(name):
    early = set(imports(MODULES[name], at_import_time=True))
    if name not in LATE:
        assert not {imported.split(".")[0] for imported in early} & OPTIONAL
    assert not early & LATE


def test_the_modules_that_must_be_imported_late_are_there():
    assert MODULES.keys() >= LATE


# --- the experiments -------------------------------------------------------------------------

TABLES = Path(experiments.__file__).parent
COMMON = {f"experiments.common.{path.stem}": path for path in (TABLES / "common").glob("*.py")}


def other_rooms(path):
    """What a module imports of the experiments, but for what is common to them."""
    names = [name.split(".") for name in imports(path) if name.split(".")[0] == "experiments"]
    return {".".join(name) for name in names if name[1:2] != ["common"]}


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_an_experiment_imports_from_common_and_the_library_alone(name):
    assert not other_rooms(TABLES / f"{name}.py")


@pytest.mark.parametrize("path", COMMON.values(), ids=COMMON)
def test_what_is_common_imports_no_experiment(path):
    assert not other_rooms(path)


def test_there_is_no_import_circle():
    paths = ROOMED | COMMON
    graph = {name: paths.keys() & set(imports(path)) - {name} for name, path in paths.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(paths)


def test_every_module_beside_common_is_in_the_list_of_experiments():
    modules = {path.stem for path in TABLES.glob("*.py")}
    assert modules == {"__init__", "__main__", "report", *experiments.EXPERIMENTS}
