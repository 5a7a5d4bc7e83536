"""The page in a real browser: one server with the embedded editor, one Chromium, and one page for each of two people.

Opening the page costs more than an edit. The tests go on where the one before has left it, and compare with that.
"""

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from specedit.app.examples import SIZE as SIZE_OF_EXAMPLES
from specedit.app.examples import TASKS
from specedit.app.server import serving
from specedit.app.uploads import Limits
from specedit.micro import scenes

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-gpu-rasterization", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium was found; apt-get install chromium"),
]
PROMPT = "add a small red star at the right"
SIZE = (256, 128)
LEFT, RIGHT = ((36, 60), (44, 68)), ((196, 60), (204, 68))  # strokes
EXAMPLE = 1  # of the page, which is the task of this number
IMAGES = Path(__file__).parents[2] / "docs" / "images"
MOST_BYTES = 300_000  # of a picture in the documentation
WIDTH, SCALE = 1280, 0.25  # of the window, and its pixels for each of them: they are drawn without a GPU
PATIENCE = 60_000  # ms; a busy machine is slow
# Without a GPU the CPU draws the painter, which draws itself anew for every frame: a few in a second are enough.
FRAME, SOON = 400, 800  # ms between two frames, and until what follows an action is there
FEW_FRAMES = f"""
    window.requestAnimationFrame = draw => window.setTimeout(() => draw(performance.now()), {FRAME});
    window.cancelAnimationFrame = number => window.clearTimeout(number);
"""


@pytest.fixture(scope="module")
def example_size(pytestconfig):
    """Small, unless somebody will look at them."""
    return SIZE_OF_EXAMPLES if pytestconfig.getoption("--screenshots") else 128


@pytest.fixture(scope="module")
def address(example_size):
    with serving(limits=Limits(bytes=300_000, pixels=10**6), example_size=example_size) as address:
        yield address


@pytest.fixture(scope="module")
def scale(pytestconfig):
    return 1 if pytestconfig.getoption("--screenshots") else SCALE


@pytest.fixture(scope="module")
def browsers(scale):
    """Two people's browsers: one process, with nothing in common."""
    window = dict(viewport={"width": WIDTH, "height": 1000}, device_scale_factor=scale, reduced_motion="reduce")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        people = [browser.new_context(**window) for _ in range(2)]
        for one in people:
            one.add_init_script(FEW_FRAMES)
        yield people
        browser.close()


class Visit:
    """One person's page."""

    def __init__(self, context, address):
        self.context, self.page = context, context.new_page()
        self.picture = None
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.set_default_timeout(PATIENCE)
        self.page.goto(address)
        self.page.wait_for_selector("#painter canvas")
        self.prompt = self.page.locator("#prompt textarea, #prompt input").first

    def click(self, name):
        self.page.locator(f"#{name}").click()

    def upload(self, path):
        self.page.locator("#file input[type=file]").set_input_files(str(path))

    def open(self, path):
        """Upload a picture that is not there yet, and wait until the painter shows it."""
        if self.picture == path:
            return
        zoom = self.zoom()
        self.upload(path)
        expect(self.page.locator("#file")).to_contain_text(path.stem[:4], timeout=PATIENCE)
        self.shown(zoom)
        self.picture = path

    def take_example(self, number):
        """Click on an example, and wait until the painter shows it."""
        zoom, self.picture = self.zoom(), None
        self.page.locator("#examples img").nth(number).click()
        self.shown(zoom)

    def zoom(self):
        """Percent at which the painter shows its picture."""
        return int(re.search(r"(\d+)%", self.page.locator("#painter").inner_text())[1])

    def shown(self, before):
        """Wait until the painter shows a picture of another size, at another zoom, than before."""
        fits = re.compile(rf"(?<!\d)(?!{before}%)(9\d|\d{{3}})%")  # the empty canvas is twice as large as its place
        expect(self.page.locator("#painter")).to_contain_text(fits, timeout=PATIENCE)
        self.page.wait_for_timeout(SOON)

    def paint(self, *points, size=SIZE):
        """Draw one stroke through points (x, y) of the picture, which has this size, in the painter's middle."""
        box = self.page.locator("#painter canvas").last.bounding_box()
        zoom = self.zoom() / 100
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        places = [[m + zoom * (p - side / 2) for m, p, side in zip(middle, point, size)] for point in points]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places:
            self.page.mouse.move(*place, steps=3)
        self.page.mouse.up()
        self.page.wait_for_timeout(SOON)  # the painter sends its layers a moment later

    def choose(self, name, value):
        self.page.locator(f"#{name} input").click()
        self.page.get_by_role("option", name=value, exact=True).click()

    def ask(self, prompt=PROMPT, preset="few-4"):
        """Ask for an edit, without waiting for it."""
        self.prompt.fill(prompt)
        if self.page.locator("#preset input").input_value() != preset:
            self.choose("preset", preset)
        self.click("edit")

    def shows(self):
        """What a page has of edits: its heading, its pictures and its history."""
        heading = self.page.locator("#result-heading").inner_text()
        return heading, self.page.locator("#result img").count(), self.history()

    def heading(self, text):
        expect(self.page.locator("#result-heading")).to_contain_text(text, timeout=PATIENCE)

    def pair(self):
        """Before and after, as arrays."""
        self.page.wait_for_function("document.querySelectorAll('#result img').length == 2")
        return [self.read(image) for image in self.page.locator("#result img").all()]

    def read(self, image):
        """The pixels of a picture on the page."""
        file = self.context.request.get(image.get_attribute("src")).body()
        return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)

    def said(self, text):
        """The messages on the page, once this text is among them; they are then closed."""
        toasts = self.page.locator(".toast-body")
        expect(toasts.filter(has_text=text).first).to_be_visible(timeout=PATIENCE)
        texts = " ".join(toasts.all_inner_texts())
        for close in self.page.locator(".toast-close").all():
            close.click()
        expect(toasts).to_have_count(0, timeout=PATIENCE)
        return texts

    def history(self):
        return self.page.locator("#history img").count()


@pytest.fixture(scope="module")
def visits(browsers, address):
    """The page of each browser, as it was left."""
    opened = {}
    yield opened
    for one in opened.values():
        one.page.close()


@pytest.fixture
def visit(browsers, address, visits):
    """Gives a person's page. At the end nothing was loaded from elsewhere, and no script has failed."""

    def page_of(person=0, new=False):
        if new and person in visits:
            visits.pop(person).page.close()
        if person not in visits:
            visits[person] = Visit(browsers[person], address)
        return visits[person]

    yield page_of
    for one in visits.values():
        assert not [url for url in one.requests if not url.startswith((address, "data:", f"blob:{address}"))]
        assert not one.errors


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Files of two scenes, each with its pixels."""
    folder, files = tmp_path_factory.mktemp("scenes"), []
    for i, seed in enumerate((3, 4)):
        source = scenes.sample(seed, (SIZE[1], SIZE[0])).source
        source.save(folder / f"in{i}.png")
        files.append((folder / f"in{i}.png", np.asarray(source).astype(int)))
    return files


def test_a_painted_edit_changes_its_place_alone_and_can_be_taken_back(visit, drawn, tmp_path):
    path, source = drawn[0]
    page = visit(new=True)
    page.open(path)
    page.paint(*RIGHT)
    page.ask()
    page.heading(f"1. {PROMPT}")
    before, after = page.pair()
    assert np.array_equal(before, source)
    changed = (before != after).any(-1)
    assert changed[:, 160:].any() and not changed[:, :96].any()
    assert "TFLOPs" in page.page.locator("#cost").inner_text() and page.history() == 1
    with page.page.expect_download() as download:
        page.click("download")
    download.value.save_as(tmp_path / "result.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "result.png")), after)

    page.click("go-on")  # the next edit is one of the result
    page.page.wait_for_timeout(SOON)
    page.paint(*LEFT)
    page.ask("add a small blue star at the left")
    page.heading("2. add a small blue star at the left")
    second, third = page.pair()
    assert np.array_equal(second, after) and page.history() == 2
    changed = (second != third).any(-1)
    assert changed[:, :96].any() and not changed[:, 160:].any()

    page.click("undo")
    page.heading(f"1. {PROMPT}")
    assert np.array_equal(page.pair()[1], after)
    page.click("undo")
    page.heading("No edit yet.")
    assert page.page.locator("#result img").count() == 0 and page.history() == 2
    page.click("undo")
    page.said("undo: expected at least one edit, got none to take back")


@pytest.mark.thorough
def test_a_cancelled_edit_ends_and_changes_nothing(visit, drawn):
    page = visit()
    page.open(drawn[0][0])
    before, _, made = page.shows()
    page.ask(preset="quality")
    expect(page.page.locator("#result")).to_contain_text(re.compile("step [0-9]"), timeout=PATIENCE)
    page.click("cancel")
    page.said("Cancelled; nothing was changed.")
    page.heading(before)
    assert page.history() == made
    page.click("cancel")
    page.said("Nothing is under way.")
    page.paint(*RIGHT)
    page.ask()  # and the next one runs
    page.heading(f"{made + 1}. {PROMPT}")


@pytest.mark.thorough
def test_what_cannot_be_edited_is_a_message(visit, tmp_path):
    page = visit(1, new=True)
    for name, content, says in (
        ("broken.png", b"\x89PNG\r\n\x1a\nno picture", "broken.png: expected a picture that can be read"),
        ("large.png", bytes(400_000), "maximum allowed size"),
        ("wide.png", (1500, 1000), "wide.png: expected at most 1 megapixels, got 1.5 (1500 x 1000)"),
        ("small.png", (40, 80), "small.png: expected at least 64 px a side, got 40 x 80"),
    ):
        if isinstance(content, tuple):
            Image.new("RGB", content, "red").save(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
        page.upload(tmp_path / name)
        said = page.said(says)
        assert "Traceback" not in said and str(tmp_path) not in said
    page.ask()
    page.said("picture: expected one to edit, got none")
    page.take_example(0)
    expect(page.prompt).to_have_value(re.compile("cross"))
    page.ask("paint a dragon")
    page.said('expected words that the embedded editor knows, got "dragon"')
    page.page.get_by_text("What this editor understands").click()
    expect(page.page.locator("#words")).to_contain_text("remove the <object>")
    page.page.get_by_text("What this editor understands").click()


@pytest.mark.thorough
def test_two_people_at_once_see_their_own_pictures_alone(visit, drawn):
    people = [visit(0), visit(1)]
    people[0].open(drawn[0][0])
    made, others = people[0].history(), people[1].shows()
    people[0].paint(*RIGHT)
    people[0].ask("add a small red star at the right")
    people[0].heading(f"{made + 1}. add a small red star at the right")
    assert people[1].shows() == others
    people[1].open(drawn[1][0])
    people[1].paint(*RIGHT)
    for page, color in zip(people, ("blue", "green")):  # at once: one waits for the other
        page.ask(f"add a small {color} ring at the right")
    people[0].heading(f"{made + 2}. add a small blue ring at the right")
    people[1].heading("1. add a small green ring at the right")
    for page, (_, source), count in zip(people, drawn, (made + 2, 1)):
        assert np.array_equal(page.pair()[0], source) and page.history() == count


@pytest.mark.thorough
def test_an_example_is_edited_and_compared_and_the_page_is_photographed(
    visit, pytestconfig, example_size, scale, tmp_path
):
    page, case = visit(1, new=scale == 1), scenes.sample(TASKS[EXAMPLE][0], example_size, TASKS[EXAMPLE][1])
    page.take_example(EXAMPLE)
    expect(page.prompt).to_have_value(case.prompt)
    rows, columns = np.nonzero(case.mask)
    across, middle = (columns.min(), columns.max()), (rows.min() + rows.max()) / 2
    lines = zip((rows.min(), middle, rows.max()), (across, across[::-1], across))
    page.paint(*[(x, y) for y, line in lines for x in line], size=case.source.size)
    page.ask(case.prompt, "turbo")
    page.heading(f"1. {case.prompt}")
    before, after = page.pair()
    assert np.array_equal(before, np.asarray(case.source)) and not np.array_equal(before, after)

    page.page.get_by_role("tab", name="Where it looked").click()
    expect(page.page.locator("#overlay img")).to_be_visible()
    light = page.read(page.page.locator("#overlay img")).mean(-1) / (after.mean(-1) + 1)
    assert light[case.mask].mean() > 1.5 * light[~case.mask].mean()
    assert "not run" in page.page.locator("#cost").inner_text()
    page.page.get_by_role("tab", name="Stock beside it").click()
    page.click("compare")
    expect(page.page.locator("#stock img")).to_have_count(2, timeout=PATIENCE)
    assert "not run" not in page.page.locator("#cost").inner_text()

    page.page.get_by_role("tab", name="Before and after").click()
    box = page.page.locator("#result img").first.bounding_box()
    page.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.page.mouse.down()  # the slider, to the middle of what was edited
    page.page.mouse.move(box["x"] + box["width"] * columns.mean() / case.source.width, box["y"] + 20, steps=5)
    page.page.mouse.up()
    page.page.mouse.move(0, 0)
    page.page.wait_for_timeout(1000)
    file = (IMAGES if pytestconfig.getoption("--screenshots") else tmp_path) / "app.png"
    page.page.screenshot(path=file, full_page=True)
    shot = Image.open(file).convert("RGB").quantize(256)
    shot.save(file, optimize=True)
    assert file.stat().st_size < MOST_BYTES and shot.width == WIDTH * scale
