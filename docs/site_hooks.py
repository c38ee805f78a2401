"""mkdocs hooks: pages from outside docs/, links that leave docs/, and roles in docstrings."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Page: the file that it shows.
ADDED = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "quickstart.md": "examples/quickstart.ipynb",
}
PICTURES = (".png", ".svg")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:func|class|meth|mod|attr):(?=<code>)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/: the pages of `ADDED`, and every picture that a page shows."""
    for page, source in ADDED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        content = _notebook(text) if source.endswith(".ipynb") else text
        files.append(File.generated(config, page, content=content))
    for file in files.documentation_pages():
        for picture, _, target, _ in LINK.findall(file.content_string):
            path = _repository_path(file, target)
            if picture and path.suffix in PICTURES and path.parts[0] != "docs":
                files.append(File.generated(config, str(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Point each link to its place in the site; what is not part of it, at the repository, or by its path alone."""

    def moved(link: re.Match[str]) -> str:
        picture, text, target, anchor = link.group(1), link.group(2), link.group(3), link.group(4) or ""
        path = _repository_path(page.file, target)
        shown = next((name for name, source in ADDED.items() if str(path) == source), None)
        if path.parts[0] == "docs":
            shown = str(path.relative_to("docs"))
        elif picture:
            shown = str(path)
        if shown is not None:
            relative = os.path.relpath(shown, PurePosixPath(page.file.src_uri).parent)
            return f"{picture}[{text}]({relative}{anchor})"
        if not (ROOT / path).exists():
            return link.group(0)  # mkdocs says that it leads nowhere
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        return f"`{path}`" if str(path).endswith(text.strip("`")) else f"{text} (`{path}`)"

    return LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name their neighbours by Sphinx's roles; the site shows the name alone."""
    return ROLE.sub("", html)


def _notebook(text: str) -> str:
    """A notebook as Markdown: its text, its code, what it printed and drew."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append("```text\n" + "".join(output["text"]).rstrip() + "\n```")
            elif "image/png" in output["data"]:
                parts.append(f"![](data:image/png;base64,{output['data']['image/png'].strip()})")
    return "\n\n".join(parts) + "\n"


def _repository_path(file: File, target: str) -> PurePosixPath:
    """The path, from the repository's root, of a link's target; links of added pages start at the file they show."""
    source = ADDED.get(file.src_uri, f"docs/{file.src_uri}")
    return PurePosixPath(os.path.normpath(PurePosixPath(source).parent / target))
