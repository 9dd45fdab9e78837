"""Builds the web edition into docs/_build/html: `python docs/build.py`, in an environment with docs/requirements.txt.

The README is its first page, the notebooks stand in it as they are saved. Warnings are errors; then each link within
the site is followed, and nothing may come from another host. `--builder linkcheck` tries the links to other hosts
instead, `--builder gettext` extracts the texts for a translation, which `--language` then builds.
"""

import argparse
import ast
import posixpath
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SOURCE, SITE = DOCS / "_build/source", DOCS / "_build/html"
PAGES = ["results/README.md", "tests/benchmarks/README.md", "tests/browser/README.md", "data/README.md",
         "CONTRIBUTING.md"]
CONTENTS = """

```{toctree}
:hidden:
:caption: The series

%s
```

```{toctree}
:hidden:
:caption: For a NaN of your own

procedure
whynan
```

```{toctree}
:hidden:
:caption: Solutions

%s
```

```{toctree}
:hidden:
:caption: Beside it

%s
```
"""
VERDICTS = """# What whynan says, and what cures it

[`whynan.py`](whynan.py) is one file: copy it beside your script, and put your loop into `with whynan.watch(net):`.
Where the evidence is sufficient, its report ends in one of these verdicts. [The procedure](procedure.md) is what to do
without it.

| verdict | what to do |
|---|---|
%s
"""


def verdicts():
    """What whynan.py may say, and the cure of each, read without importing it (that would need torch)."""
    tree = ast.parse((ROOT / "whynan.py").read_text(encoding="utf-8"))
    value, = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "VERDICTS")
    return ast.literal_eval(value).items()


def label(page, heading):
    """The name of a heading for all pages; from its text or from what JupyterLab and GitHub call it in a link."""
    return re.sub(r"\W+", "-", f"{Path(page).stem} {heading}").lower()


def linked(text, page):
    """The Markdown of a page with links that lead somewhere in the site: a heading has a label, a folder an index, the
    README is the first page, and what is no page the site carries as a file."""
    def target(match):
        link, _, heading = match[1].partition("#")
        if "://" in link:
            return match[0]
        if heading:
            return f"](#{label(link or page, heading)})"
        path = (ROOT / page).parent / link
        if path.is_dir():
            link = f"{link.rstrip('/')}/index.md"
        elif path.resolve() == ROOT / "README.md":
            link = link.replace("README.md", "index.md")
        elif path.is_file() and path.suffix not in (".md", ".ipynb"):
            place = SOURCE / path.resolve().relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
        return f"]({link})"

    text = re.sub(r"\]\(([^)\s]+)\)", target, text)
    return re.sub(r"^#{2,4} (.+)$", lambda heading: f"({label(page, heading[1])})=\n{heading[0]}", text, flags=re.M)


def moved(text, page):
    """A section of a page as one of its own: links lead to the same places from the top folder, headings rise."""
    text = re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", lambda link: f"]({posixpath.normpath(page.parent / link[1])})", text)
    return re.sub(r"^\([\w-]+\)=\n|^#(?=#)", "", text, flags=re.M)


def write(name, text):
    place = SOURCE / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")


def gather():
    """Put the sources of the site together in SOURCE."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(DOCS / "_static", SOURCE / "_static")
    chapters, solutions = [], []
    for path in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        name = path.relative_to(ROOT)
        if ".ipynb_checkpoints" in name.parts:
            continue
        notebook = nbformat.read(path, 4)
        (solutions if name.parent.name == "solutions" else chapters).append(name.with_suffix("").as_posix())
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = linked(cell.source, name)
                if found := re.search(r"^(## The procedure\n.*?)(?=^## |\Z)", cell.source, re.DOTALL | re.MULTILINE):
                    procedure = moved(found[1], name)
        write(name, nbformat.writes(notebook))
    write("procedure.md", procedure)
    rows = "\n".join(f"| {verdict} | {cure} |" for verdict, cure in verdicts())
    write("whynan.md", linked(VERDICTS % rows, "whynan.md"))
    deaths = [path.name for path in sorted((ROOT / "tests/nan_cases").glob("[!_]*.py"))]
    files = [f"{Path(name).name}.ipynb" for name in solutions]
    for folder, title, names in (("notebooks/solutions", "Solutions", files),
                                 ("tests/nan_cases", "The deaths", deaths)):
        entries = "\n".join(f"- [{name.removesuffix('.ipynb')}]({name})" for name in names)
        write(f"{folder}/index.md", linked(f"---\norphan: true\n---\n# {title}\n\n{entries}\n", f"{folder}/index.md"))
    for name in PAGES:
        write(name, linked((ROOT / name).read_text(encoding="utf-8"), name))
    pages = "\n".join(name.removesuffix(".md") for name in PAGES)
    write("index.md", linked((ROOT / "README.md").read_text(encoding="utf-8"), "README.md")
          + CONTENTS % ("\n".join(chapters), "\n".join(solutions), pages))


class Page(HTMLParser):
    """What a page links to, what it loads, and the places in it that a link can name."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.places = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.places |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        elif tag == "link" and attributes.get("rel") in ("canonical", "alternate", "search", "next", "prev", "author",
                                                         "index", "copyright"):
            pass  # told, not loaded
        else:
            self.loads += [attributes[key] for key in ("src", "href", "data") if attributes.get(key)]


def faults():
    """Links within the site that lead nowhere, and what comes from another host, a line each."""
    pages = {path: Page(path) for path in SITE.rglob("*.html") if "_static" not in path.parts}
    for path, page in pages.items():
        for link in {*page.links, *page.loads}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads and parts.scheme != "data":
                    yield f"{path.relative_to(SITE)} loads {link}"
                continue
            if path.name == "404.html":  # shown at any depth, so its links begin at the root
                continue
            goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not goal.is_file():
                yield f"{path.relative_to(SITE)} links to {link}: no such file"
            elif parts.fragment and goal in pages and unquote(parts.fragment) not in pages[goal].places:
                yield f"{path.relative_to(SITE)} links to {link}: no such place"
    for path in SITE.rglob("*.css"):
        for link in re.findall(r"url\(['\"]?(https?:[^)'\"]+)|@import +['\"](https?:[^'\"]+)", path.read_text("utf-8")):
            yield f"{path.relative_to(SITE)} loads {''.join(link)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builder", default="html", choices=["html", "gettext", "linkcheck"])
    parser.add_argument("--language", default="en", help="en, or one that has its translation in docs/locale")
    arguments = parser.parse_args()
    builder = arguments.builder
    gather()
    goal = DOCS / "_build" / builder
    shutil.rmtree(goal, ignore_errors=True)
    built = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", "auto", "-b", builder,
                            "-D", f"language={arguments.language}", "-d", DOCS / "_build/doctrees" / builder,
                            "-c", DOCS, SOURCE, goal])
    if built.returncode or builder != "html":
        return built.returncode
    found = sorted(faults())
    print(*found, sep="\n")
    size = sum(path.stat().st_size for path in SITE.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB: {SITE / 'index.html'}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
