"""What the site of the documentation has beyond mkdocs: linked sources as pages, checked paths, formulas as MathML.

mkdocs calls the functions by their names (`hooks` in mkdocs.yml). Every warning fails the build, which is strict.
"""

import html
import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from tools.formulas import typeset

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(?=[)#])")
ROOMS = "assets|baselines|benchmarks|configs|data|docs|engine|flow|metrics|mmdit|pipeline|storage|studies|tests|tools"
ROOMS += "|training"
PATH = re.compile(  # of a file of a room; a command; a module that is one
    rf"(?<![\w./-])(?:{ROOMS})/[\w./-]*\.(?:md|png|py|txt|yaml)\b|(?<=python )\w+\.py|(?<=python -m )(?:{ROOMS})[\w.]*"
)
QUIET = ("code", "pre", "script", "style", "math", "svg", "button", "h1", "h2", "h3", "h4", "h5", "h6")
log = logging.getLogger("mkdocs.hooks.site")


class Examples(griffe.Extension):
    """Lets the reader of docstrings know `Example:`, as it knows `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)


def outside(file: File) -> Iterator[tuple[str, str]]:
    """The links of a page that lead out of docs/: as written, and from the repository's root."""
    folder = posixpath.dirname(f"docs/{file.src_uri}")
    for link in LINK.findall(file.content_string):
        path = posixpath.normpath(posixpath.join(folder, link))
        if not path.startswith("docs/"):
            yield link, path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Every file outside docs/ to which a page links becomes a page of its own. The links of the README are checked."""
    for page in list(files.documentation_pages()):
        for _, path in outside(page):
            source = ROOT / path
            if source.is_file() and f"source/{path}.md" not in files.src_uris:
                body = f"# {path}\n\n````{source.suffix[1:]}\n{source.read_text()}````\n"
                new = File.generated(config, f"source/{path}.md", content=body, inclusion=InclusionLevel.NOT_IN_NAV)
                files.append(new)
    for name in ("README.md", "CHANGELOG.md"):
        for link in LINK.findall((ROOT / name).read_text()):
            if not (ROOT / link).exists():
                log.warning("%s links to %s, which is not there", name, link)
    check_paths((ROOT / "README.md").read_text(), "README.md")
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links to files outside docs/ to their pages, and checks the paths that the text names."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    check_paths(markdown, f"docs/{page.file.src_uri}")
    for link, path in outside(page.file):
        target = posixpath.relpath(f"source/{path}.md", posixpath.dirname(page.file.src_uri) or ".")
        if f"source/{path}.md" in files.src_uris:
            markdown = markdown.replace(f"]({link})", f"]({target})")
    return markdown


def check_paths(text: str, name: str) -> None:
    """Warns of files and modules of this repository that a text names and that are not there."""
    for path in dict.fromkeys(PATH.findall(text)):
        module = ROOT / path.replace(".", "/")
        if not any(place.exists() for place in (ROOT / path, module, module.with_suffix(".py"))):
            log.warning("%s names %s, which is not there", name, path)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML: LaTeX between dollars everywhere, and in the API the plain ones of the docstrings."""
    if page.file.src_uri.startswith("api/"):
        content = "".join(spoken(content))

    def mathml(found: re.Match[str]) -> str:
        try:
            out = convert(html.unescape(found[2]).strip(), display="block" if found[1] == "[" else "inline")
        except Exception as error:
            log.warning("docs/%s: %s is no formula: %r", page.file.src_uri, found[2], error)
            return found[0]
        if "\\" in out:
            log.warning("docs/%s: %s has a command that cannot be typeset", page.file.src_uri, found[2])
        return out

    return re.sub(
        r'<(?:span|div) class="arithmatex">\\([(\[])(.+?)\\[)\]]</(?:span|div)>', mathml, content, flags=re.DOTALL
    )


def spoken(content: str) -> Iterator[str]:
    """HTML piece by piece, with the formulas in its text marked as arithmatex marks those between dollars."""
    depth = 0
    for piece in re.split(r"(<[^>]+>)", content):
        if tag := re.match(r"<(/?)(\w+)", piece):
            if tag[2] in QUIET or 'class="arithmatex"' in piece or (depth and tag[2] in ("span", "div")):
                depth += -1 if tag[1] else 1
            yield piece
        else:
            text = piece if depth else html.escape(typeset(html.unescape(piece)), quote=False)
            yield re.sub(r"\\\(.+?\\\)", r'<span class="arithmatex">\g<0></span>', text) if text != piece else text
