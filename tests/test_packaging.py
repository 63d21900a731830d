"""The wheel holds what it should, and works in a directory where nothing else lies."""

import email
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import advjax
from tests.test_documentation import README, snippets
from tests.test_imports import OPTIONAL

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

WITHOUT_EXTRAS = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_with_its_types_digits_and_licence_alone(contents):
    info = f"advjax-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in contents} == {"advjax", info}
    assert contents["advjax/py.typed"] == b""
    digits = "advjax/data/mnist_sample.npz"
    assert contents[digits] == (ROOT / digits).read_bytes()
    assert contents[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "advjax").rglob("*.py")}
    assert {name for name in contents if name.endswith(".py")} == modules


def test_the_metadata_ask_for_what_the_project_does(contents):
    (raw,) = (raw for name, raw in contents.items() if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(raw)
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    extras = PROJECT["optional-dependencies"]

    def asked(extra):
        return {
            (requirement.name, requirement.specifier)
            for requirement in required
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        }

    def declared(lines):
        for requirement in map(Requirement, lines):
            if requirement.name == "advjax":
                for extra in requirement.extras:
                    yield from declared(extras[extra])
            else:
                yield requirement.name.replace("_", "-"), requirement.specifier

    urls = [", ".join(url) for url in PROJECT["urls"].items()]
    assert metadata.get_all("Project-URL") == urls
    assert metadata.get_all("Provides-Extra") == sorted(extras)
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["License-Expression"] == PROJECT["license"]
    base = set(declared(PROJECT["dependencies"]))
    assert asked("") == base
    for extra, lines in extras.items():
        assert asked(extra) == base | set(declared(lines)), extra


def test_the_readme_s_first_example_runs_from_the_wheel_without_the_extras(wheel, tmp_path):
    """In an empty directory, and an environment that finds the dependencies in the one here.

    A `.pth` file adds a directory but obeys none that lie in it: the checkout is not found.
    """
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    venv.create(environment)
    places = {"base": str(environment), "platbase": str(environment)}
    scripts, packages = (
        Path(sysconfig.get_path(name, "venv", places)) for name in ("scripts", "purelib")
    )
    python = scripts / "python"
    into = [sys.executable, "-m", "pip", "--python", python, "install", "-q"]
    subprocess.run([*into, "--no-deps", "--no-index", wheel], check=True)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    where = "import advjax; print(advjax.__version__, advjax.__file__)"
    code = WITHOUT_EXTRAS + snippets(README)[0] + where
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    success, version_and_place = subprocess.run(
        [python, "-c", code],
        cwd=empty,
        env=variables,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.splitlines()
    assert success.startswith("1.0 ")
    version, place = version_and_place.split(maxsplit=1)
    assert version == PROJECT["version"]
    assert Path(place) == packages / "advjax" / "__init__.py"
    assert not list(empty.iterdir())


def test_the_version_is_that_of_the_metadata():
    assert advjax.__version__ == importlib.metadata.version("advjax")


def test_a_source_tree_that_is_not_installed_can_be_imported():
    code = (
        "import importlib.metadata as metadata\n"
        "known = metadata.version\n"
        "def version(name):\n"
        "    if name == 'advjax': raise metadata.PackageNotFoundError(name)\n"
        "    return known(name)\n"
        "metadata.version = version\n"
        "import advjax; print(advjax.__version__)"
    )
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, check=True, cwd=ROOT, capture_output=True, text=True).stdout == (
        "unknown\n"
    )


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    for field in ("version", "license"):
        assert f"{field}: {PROJECT[field]}" in citation
