"""What users meet is in the docs, and what is generated is up to date."""

import re
import tomllib
from pathlib import Path

import pytest

import onebit_core
from benchmarks import api_reference, sizing
from benchmarks.cli_reference import render
from benchmarks.quality_picture import description_of, picture_of
from benchmarks.quality_table import newest_file, pages
from onebit_core.methods import METHODS
from onebit_core.model.blocks import LAYOUTS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_with_its_settings(name):
    """Formula, source and settings of each method stand in docs/methods."""
    page = (DOCS / "methods" / f"{name}.md").read_text()
    assert "arXiv" in page or name == "rtn"
    for setting in METHODS[name].config().to_dict():
        assert f"`{setting}`" in page, setting


def test_every_architecture_is_listed():
    """The rows of the table stand in docs/models.md, and no others."""
    listed = re.findall(r"`(\w+ForCausalLM)`", (DOCS / "models.md").read_text())
    assert sorted(listed) == sorted(LAYOUTS)


def test_the_command_reference_is_current():
    """docs/cli.md is what `make docs` prints."""
    assert (DOCS / "cli.md").read_text() == render()


@pytest.mark.parametrize(("page", "printed"), [("api-reference.md", api_reference), ("sizing.md", sizing)])
def test_generated_pages_are_current(page, printed):
    """They are what `make docs` prints."""
    assert (DOCS / page).read_text() == printed.render()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    """No dead relative link."""
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_the_tables_of_quality_are_the_committed_measurement():
    """Every number in the README and on the methods' pages comes from the newest result file."""
    assert newest_file().name in (ROOT / "README.md").read_text()
    texts = dict(pages())
    assert set(texts) >= {
        ROOT / "README.md",
        DOCS / "quality.md",
        *(DOCS / "methods" / f"{name}.md" for name in METHODS),
    }
    for page, text in texts.items():
        assert page.read_text() == text, "bring it up to date: python -m benchmarks.quality_table"


def test_the_results_picture_is_the_committed_measurement():
    """The README shows the picture of the newest result file, and it was drawn from what that file holds now."""
    picture = picture_of(newest_file())
    assert f"](benchmarks/results/{picture.name})" in (ROOT / "README.md").read_text()
    assert description_of([newest_file()]) in picture.read_text(), "draw it anew: python -m benchmarks.quality_picture"


def test_versions_agree():
    """The package, pyproject and the changelog speak of the same version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == onebit_core.__version__
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def test_pins_cover_every_dependency_and_lie_in_its_range():
    """Each requirement of pyproject has a pin in the constraints file that satisfies it."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    pins = dict(line.split("==") for line in (ROOT / ".ci" / "constraints.txt").read_text().split() if "==" in line)
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    for requirement in map(Requirement, wanted):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name != "onebit":
            assert requirement.specifier.contains(pins[name], prereleases=True), requirement
