"""Hooks of mkdocs: add the pages and plots that stand outside of docs/, and keep docstrings whole.

README.md is the front page. Links between pages are those that work in the repository; here they are changed
to the places that the pages have in the site.
"""

import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for plot in sorted(ROOT.glob("bench/results/*.png")):
        files.append(File.generated(config, str(plot.relative_to(ROOT)), abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    """Makes links of top-level pages to docs/ and to the repository's top folder links to top-level pages."""
    if "/" in page.file.src_uri:
        return markdown
    markdown = re.sub(r"\]\((docs|\.\.)/", "](", markdown)
    for source, target in PAGES.items():
        markdown = markdown.replace(f"]({source}", f"]({target}")
    return markdown


class Angles(griffe.Extension):
    """Escapes <theta, m_j> in the text of docstrings, which Markdown takes for HTML. Code stays."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            lines = obj.docstring.value.split("\n")
            text = (line if line.startswith("    ") else line.replace("<", "&lt;") for line in lines)
            obj.docstring.value = "\n".join(text)
