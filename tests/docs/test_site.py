"""The site is built without a warning and without a network, and has every page and every public name."""

import inspect
import re

import pytest

import dma_diffusers
from tests.docs.site import ROOT, build, hook, pages

NAMES = tuple(dma_diffusers.__all__)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    hook()  # says what to install, where that is missing
    before = sorted((ROOT / "docs").iterdir())
    folder = tmp_path_factory.mktemp("site")
    built = build(folder)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    assert sorted((ROOT / "docs").iterdir()) == before
    return folder


def article(page) -> str:
    """Return the words of a built page, without its navigation."""
    text = re.search(r"<article.*?</article", page.read_text(), re.DOTALL)[0]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", text))


def test_no_page_loads_anything_from_elsewhere(site):
    loading = re.compile(
        r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\"\s>]+)"
    )
    built = [page for page in site.rglob("*.html") if not page.name.startswith("h200_")]
    assert len(built) > 30
    assert {found for page in built for found in loading.findall(page.read_text())} == set()


def test_included_sections_and_results_are_there(site):
    assert "Importing DMAAttnProcessor, apply, report or restore teaches" in article(
        site / "first-picture/index.html"
    )
    assert "What runs where" in article(site / "shown/index.html")
    speed = site / "eval/results/speed/index.html"
    assert (
        'href="../h200_bench.json.gz"' in speed.read_text()
        and (site / "eval/results/h200_bench.json.gz").is_file()
    )


def test_every_section_of_the_readme_stands_on_one_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    sections = [hook().slug(words, "-") for _, marks, words in hook().headings(lines) if marks == "##"]
    homes = hook().Repository(ROOT).homes
    assert [name for name in sections if ("README.md", name) not in homes] == []
    assert set(homes.values()) <= set(pages())


def test_every_page_of_docs_is_in_the_navigation():
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= set(pages())


@pytest.mark.parametrize("name", NAMES)
def test_public_names_are_documented(name, site):
    public = getattr(dma_diffusers, name)
    documented = inspect.getdoc(public)
    sections = dict(re.findall(r"^(\w+):\n((?:[ ]{4}.*\n?|\n)+)", documented, re.MULTILINE))
    parameters = inspect.signature(public).parameters.values()
    described = re.findall(
        r"^    (\*{0,2}\w+): ", sections.get("Args") or sections["Attributes"], re.MULTILINE
    )
    stars = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}
    assert described == [stars.get(parameter.kind, "") + parameter.name for parameter in parameters]
    assert ">>> " in sections["Examples"]
    returned = inspect.signature(public).return_annotation
    is_class = inspect.isclass(public)
    assert ("Returns" in sections) == (not is_class and returned not in (None, "None"))
    assert "Raises" in sections or name == "report"
    assert f'id="{public.__module__}.{name}"' in (site / "reference/index.html").read_text()


PAGE = """# Title
See [there](kernels/x.md#y) and [below](#second).

## First
- one
```bash
## no heading
```
### Deeper
more

## Second
The list:
- two
"""


def test_a_section_is_included_with_its_links_turned(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "docs" / "a.md").write_text(
        "# A\n<!-- include README.md -->\n\n<!-- include README.md#second -->"
    )
    (tmp_path / "docs" / "b.md").write_text("# B\n<!-- include README.md#first -->\n[s](../README.md#second)")
    repository = hook().Repository(tmp_path)
    assert "[there](../kernels/x.md#y) and [below](#second)." in repository.text("docs/a.md")
    text = repository.text("docs/b.md")
    assert "## no heading" in text and "### Deeper" in text and "The list" not in text
    assert "[s](a.md#second)" in text
    assert "The list:\n\n- two" in hook().with_lists(repository.text("docs/a.md"))


def test_a_section_that_is_not_there_or_stands_twice_is_named(tmp_path):
    from mkdocs.exceptions import PluginError

    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "docs" / "a.md").write_text("<!-- include README.md#frist -->")
    with pytest.raises(PluginError, match=r"README\.md has no section #frist"):
        hook().Repository(tmp_path).text("docs/a.md")
    (tmp_path / "docs" / "b.md").write_text("<!-- include README.md#frist -->")
    with pytest.raises(PluginError, match=r"docs/b.md includes README.md#frist, which stands on docs/a.md"):
        hook().Repository(tmp_path)


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n[b](b.md)")
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"site_name: a\nhooks: [{ROOT}/docs/pages.py]\nnav: [docs/index.md]\n")
    built = build(tmp_path / "site", config)
    assert built.returncode == 1 and "b.md" in built.stderr
