"""What the page's tests share: models that answer at once, and one person's desk on them."""

import pytest

from specedit import pipelines
from specedit.app.desk import Desk
from specedit.app.models import Models


@pytest.fixture
def loaded(monkeypatch, make_pipe):
    """`pipelines.load` gives a tiny pipeline under every name; the pipelines by name, once they are loaded."""
    made = {}

    def prepare(image):
        width, height = image.size
        return image, dict(height=height, width=width, max_area=height * width, _auto_resize=False)

    def load(name, offload=False):
        made[name] = make_pipe()
        return made[name], prepare

    monkeypatch.setattr(pipelines, "load", load)
    return made


@pytest.fixture
def models(loaded):
    return Models()


@pytest.fixture
def desk(models, picture):
    desk = Desk(models)
    desk.open(picture(96, 128))
    return desk
