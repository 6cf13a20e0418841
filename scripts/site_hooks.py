"""What mkdocs calls while it builds the site (`hooks` in mkdocs.yml): adds the made pages, and turns links into pages.

A link in Markdown is what it is on a code host: a path from the file that it stands in to a file or folder of the
repository. On the site it leads to the page that shows the file; a source that has no page of its own gets one with its
text, a folder one with a list, and data is copied. Made pages may also link to `/path/from/the/root`, `source:path`
(the text of the file itself), `asset:path` (a copy) and `page:uri`.
"""

import posixpath
import re
import shutil
import sys
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import site_pages
from site_pages import ROOT, Page

LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\()([^()\s]+(?:\([^()\s]*\))?)(\))")
# What must not be searched for links: code.
CODE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n]*\n.*?^[ \t]*\1[ \t]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
DATA = {".csv", ".json", ".png", ".html", ".npz", ".ipynb", ".svg", ".gif"}
LANGUAGES = {".py": "python", ".toml": "toml", ".md": "markdown", ".yml": "yaml", ".cff": "yaml", "": "text"}

# Pages whose tables take the place of the list of their headings.
WIDE = ("algorithms.md", "speed.md", "comparison.md")


class Site:
    """Pages, and where files of the repository are shown."""

    def __init__(self, config, files: Files):
        self.config, self.files = config, files
        made = site_pages.make()
        self.made = {page.uri: page for page in made.pages}
        self.insertions = made.insertions
        self.places = {place: page.uri for page in made.pages for place in page.stands_for}
        self.places |= {f"docs/{file.src_uri}": file.src_uri for file in files}
        self.places |= {"algorithms": "algorithms.md", "envs": "environments.md", "experiments": "experiments.md"}
        self.added: dict[str, str] = {}
        """text of further pages, by uri"""
        self.copied: set[str] = set()

    def resolved(self, text: str, uri: str, origin: str) -> str:
        """The Markdown of a page with its links turned."""
        spans = [match.span() for match in CODE.finditer(text)]

        def turn(match: re.Match) -> str:
            if any(start <= match.start() < end for start, end in spans):
                return match[0]
            return match[1] + self.link(match[2], uri, origin, picture=match[1].startswith("!")) + match[3]

        return LINK.sub(turn, text)

    def link(self, target: str, uri: str, origin: str, picture: bool = False) -> str:
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"(https?|mailto):", target):
            return target
        kind, colon, rest = path.partition(":")
        if kind == "page" and colon:
            found = rest
        else:
            beside = posixpath.join(posixpath.dirname(origin), path)
            place = rest if colon else path[1:] if path.startswith("/") else beside
            found = self.shown(posixpath.normpath(place), "asset" if picture else kind if colon else "")
        return posixpath.relpath(found, posixpath.dirname(uri) or ".") + hash_ + anchor

    def shown(self, place: str, kind: str) -> str:
        """The uri at which a file or folder of the repository is seen; itself where there is none: mkdocs complains."""
        path = ROOT / place
        if kind != "source" and place in self.places:
            return self.places[place]
        if not path.exists() or not path.resolve().is_relative_to(ROOT):
            return place
        if path.is_dir():
            uri = f"files/{place}/index.md"
            lines = [
                f"- [{child.name}](/{place}/{child.name})" for child in sorted(path.iterdir())
                if not child.name.startswith((".", "_")) and (child.is_dir() or child.suffix in DATA | LANGUAGES.keys())
            ]  # fmt: skip
            text = f"# `{place}`\n\n" + "\n".join(lines)
        elif path.suffix in DATA or kind == "asset":
            self.copied.add(place)
            return f"files/{place}"
        else:
            uri = f"files/{place}.md"
            content = path.read_text(encoding="utf-8").rstrip("\n")
            text = f"# `{place}`\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{content}\n````"
        if uri not in self.added:
            self.added[uri] = ""  # so that folders that link to each other end
            self.added[uri] = "---\nsearch:\n  exclude: true\n---\n\n" + self.resolved(text, uri, place)
        return uri

    def hand_written(self, text: str, uri: str) -> str:
        for words, made in self.insertions.items():
            text = text.replace(f"<!-- {words} -->", made)
        return self.resolved(text, uri, f"docs/{uri}")


site: Site


def _menu(items: list, page: Page) -> None:
    """Put a page at its place in the menu."""
    for title in page.section:
        found = next((entry[title] for entry in items if isinstance(entry, dict) and title in entry), None)
        if found is None:
            found = []
            items.append({title: found})
        items = found
    items.append(page.uri)


@event_priority(100)  # before mkdocstrings looks which folders there are
def on_config(config):
    """For the reference: the modules as they are installed, in one folder."""
    there = ROOT / "build" / "reference" / "jaxrl_dist"
    shutil.rmtree(there.parent, ignore_errors=True)
    there.mkdir(parents=True)
    for path in (*(ROOT / "jaxrl_dist").glob("*"), ROOT / "envs", ROOT / "algorithms"):
        (there / path.name).symlink_to(path)
    return config


def on_files(files: Files, config) -> Files:
    global site
    site = Site(config, files)
    for page in site.made.values():
        content = site.resolved(page.text, page.uri, page.origin)
        files.append(File.generated(config, page.uri, content=content))
        for uri, picture in page.pictures.items():
            files.append(File.generated(config, uri, content=picture))
        if page.section:
            _menu(config.nav, page)
    for file in files.documentation_pages():
        if file.src_uri not in site.made:  # what it links to is made, too; its text is turned when it is read
            site.hand_written(file.content_string, file.src_uri)
    for uri, text in site.added.items():
        files.append(File.generated(config, uri, content=text))
    for place in site.copied:
        files.append(File.generated(config, f"files/{place}", abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    uri = page.file.src_uri
    if uri in WIDE:
        page.meta["hide"] = ["toc"]
    return markdown if uri in site.made or uri in site.added else site.hand_written(markdown, uri)
