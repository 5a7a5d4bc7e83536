"""The documentation in a browser: nothing is missing, nothing fails, and nothing comes from elsewhere."""

import functools
import http.server
import shutil
import threading
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
LEFT = "net::ERR_ABORTED"  # a request that was under way when the next page was opened
WIDTHS = {"desktop": 1280, "phone": 390}  # px
# What a reader would miss, as a browser sees it.
LOOK = """() => ({
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    missing: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src),
    small: [...document.querySelectorAll("article img")].filter(i => i.naturalWidth < i.clientWidth).map(i => i.src),
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    text: [...document.querySelectorAll("article p, article li, article td")]
        .filter(e => !e.querySelector("code, math")).map(e => e.innerText).join("\\n"),
})"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    """The site on a local server."""
    handler = functools.partial(Quiet, directory=str(site[1]))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


def opened(browser, addresses, scheme, width):
    """{address: what LOOK finds}, and all that went wrong on the way."""
    wrong, found = [], {}
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    page = context.new_page()
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda one: wrong.append(f"{one.failure}: {one.url}") if one.failure != LEFT else None)
    page.on("response", lambda answer: wrong.append(f"{answer.status}: {answer.url}") if answer.status > 399 else None)
    for address in addresses:
        page.goto(address, wait_until="load")
        found[address] = page.evaluate(LOOK)
    context.close()
    return found, wrong


@pytest.fixture(scope="module")
def visited(browser, pages):
    """`opened` of every page, once for each scheme and width."""
    return functools.cache(lambda scheme, width: opened(browser, pages, scheme, width))


@pytest.fixture(scope="module")
def pages(site, address):
    """The addresses of all pages, as readers type them."""
    paths = [str(path.relative_to(site[1])).removesuffix("index.html") for path in site[0]]
    return [address + path for path in sorted(paths)]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("scheme", "screen"), [("light", "desktop"), ("dark", "phone")])
def test_every_page_is_whole_in_a_browser(visited, address, raw_formula, scheme, screen):
    found, wrong = visited(scheme, WIDTHS[screen])
    assert wrong == []
    for page, seen in found.items():
        assert seen["missing"] == [] and seen["small"] == [], page
        assert seen["wide"] <= 0, f"{page}: {seen['wide']} px wider than the screen"
        assert raw_formula(seen["text"]) is None, f"{page}: {raw_formula(seen['text'])}"
        hosts = {urlsplit(link).scheme for link in seen["links"] if not link.startswith(address)}
        assert hosts <= {"https", "mailto"}, page


@pytest.mark.slow
@pytest.mark.long
def test_no_link_is_broken_in_a_browser(browser, visited, address):
    found, _ = visited("light", WIDTHS["desktop"])
    targets = {link for seen in found.values() for link in seen["links"] if link.startswith(address)}
    assert len(targets) > 100
    context = browser.new_context()
    answers = {}
    for target in targets:
        file, anchor = urldefrag(target)
        file = file.removesuffix("index.html")
        if file not in answers:
            answers[file] = 200 if file in found else context.request.head(file).status
        assert answers[file] == 200, target
        if anchor and file in found:
            assert unquote(anchor) in found[file]["ids"], target
    context.close()
