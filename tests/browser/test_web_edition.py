"""The web edition as readers see it: on a telephone, a tablet and a desktop, in light and dark, and with the ears."""

from urllib.parse import urljoin

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import SITE

PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if "_static" not in path.parts)
WIDTHS = (360, 768, 1400)
# What sticks out of the page to the right and does not scroll in a box of its own.
STICKS_OUT = """() => [...document.querySelectorAll('main *')].filter(element => {
    for (let box = element; box; box = box.parentElement)
        if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(box).overflowX)) return false;
    return element.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
}).map(element => element.outerHTML.slice(0, 100))"""
# Boxes that scroll sideways though they hold neither code, nor a table, nor a formula.
SCROLLS = """() => [...document.querySelectorAll('main *')].filter(element =>
    ['auto', 'scroll'].includes(getComputedStyle(element).overflowX)
    && element.scrollWidth > element.clientWidth + 1
    && !element.matches('pre, .highlight, .math, .pst-scrollable-table-container, mjx-container')
    && !element.closest('.output')).map(element => element.outerHTML.slice(0, 100))"""
UNTYPESET = """() => [...document.querySelectorAll('.math')].filter(formula => {
    const set = formula.querySelector('mjx-container svg');
    return !set || set.getBoundingClientRect().width < 2 || formula.querySelector('mjx-merror, [data-mml-node=merror]');
}).map(formula => formula.textContent)"""
UNSEEN = """() => [...document.querySelectorAll('main img')].filter(image =>
    !image.complete || !image.naturalWidth || image.getBoundingClientRect().width < 50 || image.alt.length < 20
).map(image => image.outerHTML.slice(0, 100))"""


def watched(page):
    """Collects what the page complains of and what it asks other hosts for."""
    faults = []
    page.on("console", lambda message: message.type == "error" and faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("requestfailed", lambda request: faults.append(f"failed: {request.url[:100]}"))
    page.on("request", lambda request: request.url.startswith(("http://127.0.0.1", "data:", "blob:"))
            or faults.append(f"another host: {request.url[:100]}"))
    return faults


def typeset(page):
    if page.locator(".math").count():
        page.wait_for_function("window.MathJax && MathJax.startup && MathJax.startup.promise")
        page.evaluate("() => MathJax.startup.promise")


@pytest.fixture(params=WIDTHS, scope="module")
def window(request, chromium):
    context = chromium.new_context(viewport={"width": request.param, "height": 900}, has_touch=request.param < 1000)
    yield context
    context.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_at_each_width(name, window, site):
    page = window.new_page()
    faults = watched(page)
    page.goto(site + name)
    typeset(page)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    for fault in (STICKS_OUT, SCROLLS, UNTYPESET, UNSEEN):
        assert page.evaluate(fault) == []
    assert faults == []
    page.close()


THOROUGH = [name for name in PAGES if name in ("index.html", "procedure.html", "search.html")
            or name.startswith(("notebooks/04", "notebooks/05"))]  # what there is in all pages, these have


@pytest.mark.parametrize(("name", "scheme"), [*((name, "light") for name in PAGES),
                                              *((name, "dark") for name in THOROUGH)])
def test_axe_finds_no_serious_fault(name, scheme, chromium, site):
    page = chromium.new_page(color_scheme=scheme, viewport={"width": 1400, "height": 900})
    page.goto(site + name)
    typeset(page)
    # the colours of code are the same on all pages, and looking at each word of it takes most of the time
    context = None if name in THOROUGH else {"exclude": [[".highlight pre"]]}
    found = Axe().run(page, context=context).response["violations"]
    page.close()
    assert [(fault["id"], len(fault["nodes"]), fault["nodes"][0]["html"][:200], fault["nodes"][0]["failureSummary"])
            for fault in found if fault["impact"] in ("serious", "critical")] == []


def test_each_chapter_has_its_figures_and_formulas(chromium, site):
    """Else the tests above, which look at all that are there, would be content with none."""
    page, seen = chromium.new_page(), {}
    for name in PAGES:
        if name.startswith("notebooks/0"):
            page.goto(site + name)
            seen[name] = page.locator("main .output img").count(), page.locator(".math").count()
    page.close()
    assert len(seen) >= 7 and sum(images for images, _ in seen.values()) >= 25
    assert sum(formulas for _, formulas in seen.values()) >= 40


def test_search_finds_what_somebody_with_a_nan_asks_for(chromium, site):
    page = chromium.new_page()
    faults = watched(page)
    for words, places in (("where trap", "whynan"), ("kaiming deviation", "notebooks/03_failing_lr")):
        page.goto(site + "search.html?q=" + words.replace(" ", "+"))
        page.wait_for_selector("#search-results li a")
        page.wait_for_function("document.querySelector('.search-summary').textContent.includes('found')")
        assert any(places in link.get_attribute("href") for link in page.locator("#search-results li a").all())
    assert faults == []
    page.close()


def test_dark_and_light_can_be_chosen_and_stay(chromium, site):
    page = chromium.new_page(color_scheme="light")
    page.goto(site)
    page.locator(".theme-switch-button:visible").click()
    page.locator(".theme-change-button[data-mode=dark]:visible").click()
    page.goto(site + "procedure.html")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.close()


def test_code_is_copied_without_prompts(chromium, site):
    context = chromium.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(site)
    block = page.locator("div.highlight", has_text="with whynan.watch(net)")
    block.hover()
    block.locator("button.copybtn").click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("import whynan\n\nwith whynan.watch(net):")
    context.close()


def test_previous_and_next_lead_through_all_chapters(chromium, site):
    page = chromium.new_page()
    page.goto(site + "index.html")
    read = []
    while page.locator("a.right-next").count():
        page.goto(urljoin(page.url, page.locator("a.right-next").get_attribute("href")))
        read.append(page.url.removeprefix(site))
    chapters = [name for name in PAGES if name.startswith("notebooks/0")]
    assert read[:len(chapters)] == chapters
    assert urljoin(page.url, page.locator("a.left-prev").get_attribute("href")) == site + read[-2]
    page.close()


def test_the_procedure_fits_on_paper(chromium, site):
    page = chromium.new_page()
    page.goto(site + "procedure.html")
    typeset(page)
    page.emulate_media(media="print")
    assert not page.locator(".bd-sidebar-primary").is_visible() and not page.locator(".copybtn").first.is_visible()
    assert page.pdf(format="A4").count(b"/Type /Page\n") <= 2
    page.close()


@pytest.mark.parametrize("way", ["hover", "tap"])
def test_the_map_shows_a_curve_where_one_points(way, chromium, site):
    """The interactive output of notebook 5 looks different for different places of the map."""
    context = chromium.new_context(viewport={"width": 360, "height": 900} if way == "tap" else None,
                                   has_touch=way == "tap")
    page = context.new_page()
    faults = watched(page)
    page.goto(site + "notebooks/05_stability_map.html")
    output = page.locator("main .output:has(script)")
    if not output.count():
        pytest.skip("notebook 5 has no interactive output")
    output.last.scroll_into_view_if_needed()
    box, looks = output.last.bounding_box(), set()
    for across in range(15, int(min(box["width"], 330)), 30):
        for down in range(15, int(min(box["height"], 330)), 30):
            (page.touchscreen.tap if way == "tap" else page.mouse.move)(box["x"] + across, box["y"] + down)
            looks.add(output.last.inner_html())
    assert len(looks) >= 6 and all("<polyline" in look or "<path" in look for look in looks)
    assert faults == []
    context.close()


def test_there_are_a_map_cards_and_a_page_for_addresses_that_are_none():
    addresses = (SITE / "sitemap.xml").read_text()
    assert all(f"/{name}</loc>" in addresses for name in PAGES if name.startswith("notebooks/0"))
    front = (SITE / "index.html").read_text(encoding="utf-8")
    assert 'property="og:image"' in front and 'property="og:description"' in front
    assert "No such page" in (SITE / "404.html").read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in SITE.rglob("*") if path.is_file()) < 30e6
