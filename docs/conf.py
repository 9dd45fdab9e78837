"""How the web edition looks. docs/build.py puts the sources together and calls Sphinx with this."""

import importlib.util
import os
import shutil
from pathlib import Path

project = "Why did my loss become NaN?"
author = "The authors of this series"
copyright = author
language = "en"

extensions = ["myst_nb", "sphinx_copybutton", "sphinx_sitemap", "notfound.extension", "sphinxext.opengraph"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
root_doc = "index"
exclude_patterns = []

# The notebooks stand as they were saved: nothing is executed.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
gettext_additional_targets = ["index"]
locale_dirs = [str(Path(__file__).parent / "locale")]

# Where the site is published, with a slash at its end: for its map, its cards and its page for addresses that are none.
html_baseurl = os.environ.get("SITE_URL", "http://localhost:8000/")
sitemap_url_scheme = "{link}"
notfound_urls_prefix = "/" + html_baseurl.split("://")[1].partition("/")[2]
notfound_context = {"title": "No such page", "body": (
    "<h1>No such page</h1><p>There is nothing at this address. The contents are on "
    f'<a href="{notfound_urls_prefix}index.html">the first page</a>, and the search finds the rest.</p>')}
ogp_site_url = html_baseurl
ogp_social_cards = {"line_color": "#0072B2", "font": "DejaVu Sans"}

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["series.css"]
html_favicon = "_static/icon.svg"
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is, until the reader chooses
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "navigation_with_keys": False,
    "navbar_start": [], "navbar_center": [], "navbar_end": [], "navbar_persistent": [],  # the side bar has all of it
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
if repository := os.environ.get("GITHUB_REPOSITORY"):
    html_theme_options |= {"repository_url": f"https://github.com/{repository}", "use_repository_button": True}

# MathJax from the site itself, so that formulas need no other host.
mathjax_path = "mathjax/tex-svg.js"
copybutton_selector = "div.highlight pre"


def copy_mathjax(app, exception):
    if not exception and app.builder.format == "html":
        package = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
        folder = Path(app.outdir, "_static/mathjax")
        folder.mkdir(exist_ok=True)
        shutil.copy(package / "static" / mathjax_path, folder)


def setup(app):
    app.connect("build-finished", copy_mathjax)
