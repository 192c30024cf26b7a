"""What the site takes from outside `docs/`: the README as its first page, notebooks and others.

Nothing is kept twice. Links are written as they are right in the repository, so that they work
where its files are read; here they are turned to where a page stands on the site.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

# File of the repository -> page of the site.
ADDED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
NOTEBOOKS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("notebooks/*.ipynb"))]
OWN = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")]
PAGES = {**ADDED, **{each: each for each in NOTEBOOKS}, **{p: p.removeprefix("docs/") for p in OWN}}
# Named in pages, but none themselves: links to them become plain names.
FILES = ("CITATION.cff", "LICENSE")

_LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> None:
    """Lists the notebooks in the navigation."""
    for entry in config.nav:
        if "Notebooks" in entry:
            entry["Notebooks"] = NOTEBOOKS


@event_priority(100)  # before the plugin that renders notebooks
def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not in `docs/`."""
    for source, page in ADDED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for notebook in NOTEBOOKS:
        # The plugin asks such a file for its folder, which a generated one has not.
        files.append(File(notebook, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between files of the repository to pages of the site."""
    here = next(source for source, of in PAGES.items() if of == page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        text, to, anchor = match.groups()
        source = posixpath.normpath(posixpath.join(posixpath.dirname(here), to))
        if source in FILES:
            return text
        if source not in PAGES:
            return match.group()  # which the strict build refuses
        to = posixpath.relpath(PAGES[source], posixpath.dirname(page.file.src_uri) or ".")
        return f"[{text}]({to}{anchor or ''})"

    return _LINK.sub(link, markdown)
