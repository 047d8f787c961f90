"""This hook makes the site of the repository's own markdown, each page at its own path, so that its links hold.

MkDocs calls the `on_…` functions (`hooks` in mkdocs.yml). Pages in the navigation, and whatever they link to, are on
the site. A page of `docs/` takes in a section of another page by a line `<!-- include README.md#install -->`, or what
stands before its first section by `<!-- include README.md -->`: the section's links are turned to that place, and links
to the section lead there.
"""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

INCLUDE = re.compile(r"^<!-- include ([^\s#]+)(?:#(\S+))? -->$", re.MULTILINE)
LINK = re.compile(r"\]\((?![a-z]+:)([^\s#)]*)(#[^\s)]*)?\)")
LIST_ITEM = re.compile(r"([-*]|\d+\.) ")
HEADING = re.compile(r"(#+) (.+)")
slug = slugify(case="lower")


class Repository:
    """A repository gives its markdown files as pages of a site; paths are relative to the root."""

    def __init__(self, root: Path):
        self.root = root
        # The page of docs/ on which each included section stands.
        self.homes: dict[tuple[str, str], str] = {}
        for page in sorted((root / "docs").glob("*.md")):
            for source, anchor in INCLUDE.findall(page.read_text()):
                home = self.homes.setdefault((source, anchor), f"docs/{page.name}")
                if home != f"docs/{page.name}":
                    raise PluginError(f"docs/{page.name} includes {source}#{anchor}, which stands on {home}")

    def text(self, path: str) -> str:
        """Return the markdown of a page, with the sections that it includes, and with links that hold on the site."""

        def included(asked: re.Match) -> str:
            source, anchor = asked.groups(default="")
            return self._with_links(section((self.root / source).read_text(), anchor, source), source, path)

        return INCLUDE.sub(included, self._with_links((self.root / path).read_text(), path, path))

    def reached(self, pages: Iterable[str]) -> set[str]:
        """Return the paths of these pages and of all files that they, and pages reached from them, link to."""
        reached: set[str] = set()
        waiting = list(pages)
        while waiting:
            path = waiting.pop()
            if path in reached or not (self.root / path).is_file():
                continue
            reached.add(path)
            if path.endswith(".md"):
                folder = PurePosixPath(path).parent
                waiting += [normpath(folder / link) for link, _ in LINK.findall(self.text(path)) if link]
        return reached

    def _with_links(self, text: str, source: str, reader: str) -> str:
        """Return `text` with the links of the page `source` as they are to be on the page `reader`."""

        def turned(found: re.Match) -> str:
            link, anchor = found.groups(default="")
            target = normpath(PurePosixPath(source).parent / link) if link else source
            target = self.homes.get((target, anchor[1:]), target)
            place = "" if anchor and target == reader else relpath(target, PurePosixPath(reader).parent)
            return f"]({place}{anchor})"

        return LINK.sub(turned, text)


def section(text: str, anchor: str, name: str) -> str:
    """Return the section of a page whose heading has this anchor; for an empty one, what precedes the first section.

    name: of the page. Raises PluginError where there is no such section.
    """
    lines = text.splitlines()
    levels = {number: (len(marks), slug(words, "-")) for number, marks, words in headings(lines)}
    if not anchor:
        return "\n".join(lines[1 : next(number for number, (level, _) in levels.items() if level > 1)])
    for start, (level, found) in levels.items():
        if found == anchor:
            stops = [number for number, (of, _) in levels.items() if number > start and of <= level]
            return "\n".join(lines[start : stops[0] if stops else len(lines)])
    raise PluginError(f"{name} has no section #{anchor} to include")


def headings(lines: list[str]) -> Iterable[tuple[int, str, str]]:
    """Yield the number of each line that is a heading, its marks and its words; lines of code are none."""
    in_code = False
    for number, line in enumerate(lines):
        in_code ^= line.lstrip().startswith("```")
        if not in_code and (found := HEADING.fullmatch(line)):
            yield number, found[1], found[2]


def with_lists(text: str) -> str:
    """Return `text` with an empty line before each list: Python-Markdown begins none without, and GitHub does."""
    lines: list[str] = []
    in_code = in_list = False
    for line in text.splitlines():
        in_code ^= line.lstrip().startswith("```")
        begins = not in_code and LIST_ITEM.match(line)
        if begins and not in_list and lines and lines[-1]:
            lines.append("")
        in_list = bool(line) and bool(begins or in_list)
        lines.append(line)
    return "\n".join(lines)


def in_navigation(entries: object) -> Iterable[str]:
    """Yield the paths of the pages that `nav` names, at any depth."""
    if isinstance(entries, str):
        yield entries
    else:
        for entry in entries.values() if isinstance(entries, dict) else entries:
            yield from in_navigation(entry)


def on_files(files: Files, config) -> Files:
    """Put the pages of the navigation, and what they link to, in the place of the files of docs/."""
    root = Path(config.config_file_path).parent
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        if file.src_uri not in config.extra_css:
            files.remove(file)
    for path in sorted(Repository(root).reached(in_navigation(config.nav))):
        file = File(path, str(root), config.site_dir, config.use_directory_urls)
        file.dest_uri = file.dest_uri.removeprefix("docs/")
        files.append(file)
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Return the markdown of a page as it is built."""
    return with_lists(Repository(Path(config.config_file_path).parent).text(page.file.src_uri))
