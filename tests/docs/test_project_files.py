"""The files that GitHub and people who cite read hold what these need."""

import re
import tomllib

import pytest
import yaml

import dma_diffusers
from tests.docs.site import ROOT

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
RELEASES = sorted((ROOT / "docs").glob("release-*.md"))


def test_the_citation_has_what_the_format_requires():
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys()
    assert CITATION["cff-version"] == "1.2.0"
    assert all("name" in author or "family-names" in author for author in CITATION["authors"])


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == dma_diffusers.__version__ == CITATION["version"]
    assert (project["license"], project["name"]) == (CITATION["license"], CITATION["title"])


def test_the_changelog_is_dated_newest_first():
    dates = re.findall(r"^### (\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE)
    assert dates and dates == sorted(dates, reverse=True)
    first = re.search(r"^## (\d+\.\d+\.\d+), (unreleased|\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE)
    assert f"release-{first[1]}.md" in {path.name for path in RELEASES}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= form.keys()
    fields = {field["id"]: field for field in form["body"]}
    assert len(fields) == len(form["body"])
    assert all(field["attributes"]["label"] for field in fields.values())
    assert "dma_diffusers.report(pipe)" in fields["receipt"]["attributes"]["description"]
    if path.stem == "problem":
        assert "dma-diffusers doctor" in fields["doctor"]["attributes"]["description"]
        assert fields["doctor"]["validations"]["required"]
