"""The documentation in a browser: nothing is missing, nothing fails, and nothing comes from elsewhere."""

import functools
import http.server
import shutil
import threading
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-gpu-rasterization", "--disable-software-rasterizer",
    "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip
LEFT = "net::ERR_ABORTED"  # a request that was under way when the next page was opened
SCREENS = {"desktop": ("light", 1280), "phone": ("dark", 390)}  # scheme and width in px
PALETTES = {"desktop": "default", "phone": "slate"}
OTHER_PALETTE = """[...document.querySelectorAll("input[name=__palette]")]
    .find(e => e.dataset.mdColorScheme != document.body.dataset.mdColorScheme).click()"""  # it is kept for later pages
SCALE = 0.25  # pixels that are drawn for each: there is no GPU
LOADED = "[...document.images].every(i => i.complete)"
# The theme moves what it hides on a narrow screen, which takes a moment on a busy machine.
SETTLED = """since => document.documentElement.scrollWidth <= document.documentElement.clientWidth
    || performance.now() - since > 2000"""
# What a reader would miss, as a browser sees it.
LOOK = """() => ({
    scheme: document.body.dataset.mdColorScheme,
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    missing: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src),
    small: [...document.querySelectorAll("article img")].filter(i => i.naturalWidth < i.clientWidth).map(i => i.src),
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    text: [...document.querySelectorAll("article p, article li, article td")]
        .filter(e => !e.querySelector("code, math")).map(e => e.textContent).join("\\n"),
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


@pytest.fixture(scope="module")
def visited(browser, pages):
    """{screen: {address: what LOOK finds}}, and all that went wrong on the way.

    Every page is loaded once, for the screens in turn, and then shown on the other one.
    """
    wrong, found = [], {screen: {} for screen in SCREENS}
    context = browser.new_context(device_scale_factor=SCALE)
    page = context.new_page()
    page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda one: wrong.append(f"{one.failure}: {one.url}") if one.failure != LEFT else None)
    page.on("response", lambda answer: wrong.append(f"{answer.status}: {answer.url}") if answer.status > 399 else None)
    for number, address in enumerate(pages):
        for turn in range(2):
            screen = list(SCREENS)[(number + turn) % 2]
            scheme, width = SCREENS[screen]
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            if turn == 0:
                page.goto(address, wait_until="load")
            else:
                page.evaluate(OTHER_PALETTE)
            page.wait_for_function(LOADED)
            page.wait_for_function(SETTLED, arg=page.evaluate("performance.now()"))
            found[screen][address] = page.evaluate(LOOK)
    context.close()
    return found, wrong


@pytest.fixture(scope="module")
def pages(site, address):
    """The addresses of all pages, as readers type them."""
    paths = [str(path.relative_to(site[1])).removesuffix("index.html") for path in site[0]]
    return [address + path for path in sorted(paths)]


@pytest.mark.thorough
@pytest.mark.long
@pytest.mark.parametrize("screen", SCREENS)
def test_every_page_is_whole_in_a_browser(visited, address, raw_formula, screen):
    found, wrong = visited
    assert wrong == []
    for page, seen in found[screen].items():
        assert seen["scheme"] == PALETTES[screen], page
        assert seen["missing"] == [] and seen["small"] == [], page
        assert seen["wide"] <= 0, f"{page}: {seen['wide']} px wider than the screen"
        assert raw_formula(seen["text"]) is None, f"{page}: {raw_formula(seen['text'])}"
        hosts = {urlsplit(link).scheme for link in seen["links"] if not link.startswith(address)}
        assert hosts <= {"https", "mailto"}, page


@pytest.mark.thorough
@pytest.mark.long
def test_no_link_is_broken_in_a_browser(browser, visited, address):
    found = visited[0]["desktop"]
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
