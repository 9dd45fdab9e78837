"""Builds the web edition into docs/_build/html: `python docs/build.py`, in an environment with docs/requirements.txt.

The README is its first page, the notebooks stand in it as they are saved. Warnings are errors; then each link within
the site is followed, and nothing may come from another host. `--builder gettext` extracts the texts for a translation
instead, `--builder linkcheck` tries the links to other hosts.
"""

import argparse
import ast
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


def as_a_terminal_shows(text):
    """The text without what a carriage return let be written over: of a progress bar its last state."""
    return re.sub(r"[^\n]*\r(?=[^\n\r])", "", re.sub(r"\r+\n", "\n", text))


def joined(outputs):
    """The outputs of a cell with what was printed in pieces joined, as a terminal shows it."""
    result = []
    for output in outputs:
        before = result[-1] if result else {}
        if output.output_type == before.get("output_type") == "stream" and output.name == before.name:
            before.text += output.text
        else:
            result.append(output)
    for output in result:
        if output.output_type == "stream":
            output.text = as_a_terminal_shows(output.text)
    return result


def linked(text, folder):
    """The Markdown text with links that lead somewhere in the site: a folder has an index, the README is the first."""
    def target(match):
        link = match[1]
        if "://" in link or link.startswith("#"):
            return match[0]
        path = (ROOT / folder / link.split("#")[0]).resolve()
        if path.is_dir():
            link = f"{link.rstrip('/')}/index.md"
        elif path == ROOT / "README.md":
            link = link.replace("README.md", "index.md")
        elif path.is_file():
            place = SOURCE / path.relative_to(ROOT)
            if not place.exists():  # not a page: the site carries the file
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)
        return f"]({link})"
    return re.sub(r"\]\(([^)\s]+)\)", target, text)


def write(name, text):
    place = SOURCE / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")


def gather():
    """Put the sources of the site together in SOURCE."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(DOCS / "_static", SOURCE / "_static")
    chapters, solutions, procedures = [], [], []
    for path in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        name = path.relative_to(ROOT)
        if ".ipynb_checkpoints" in name.parts:
            continue
        notebook = nbformat.read(path, 4)
        (solutions if name.parent.name == "solutions" else chapters).append(name.with_suffix("").as_posix())
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = linked(cell.source, name.parent)
                procedures += re.findall(r"^## (The procedure\n.*?)(?=^## |\Z)", cell.source, re.DOTALL | re.MULTILINE)
            if cell.cell_type == "code":
                cell.outputs = joined(cell.outputs)
        write(name, nbformat.writes(notebook))
    procedure, = procedures
    write("procedure.md", "# " + re.sub(r"\]\((?!http|\.\./)", "](notebooks/", procedure).replace("](../", "]("))
    write("whynan.md", linked(VERDICTS % "\n".join(f"| {verdict} | {cure} |" for verdict, cure in verdicts()), "."))
    deaths = [path.name for path in sorted((ROOT / "tests/nan_cases").glob("[!_]*.py"))]
    files = [f"{Path(name).name}.ipynb" for name in solutions]
    for folder, title, names in (("notebooks/solutions", "Solutions", files),
                                 ("tests/nan_cases", "The deaths", deaths)):
        entries = "\n".join(f"- [{name.removesuffix('.ipynb')}]({name})" for name in names)
        write(f"{folder}/index.md", linked(f"---\norphan: true\n---\n# {title}\n\n{entries}\n", folder))
    for name in PAGES:
        write(name, linked((ROOT / name).read_text(encoding="utf-8"), Path(name).parent))
    pages = "\n".join(name.removesuffix(".md") for name in PAGES)
    write("index.md", linked((ROOT / "README.md").read_text(encoding="utf-8"), ".")
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
    builder = parser.parse_args().builder
    gather()
    goal = DOCS / "_build" / builder
    shutil.rmtree(goal, ignore_errors=True)
    built = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", "auto", "-b", builder,
                            "-c", DOCS, "-d", DOCS / "_build/doctrees", SOURCE, goal])
    if built.returncode or builder != "html":
        return built.returncode
    found = sorted(faults())
    print(*found, sep="\n")
    size = sum(path.stat().st_size for path in SITE.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB: {SITE / 'index.html'}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
