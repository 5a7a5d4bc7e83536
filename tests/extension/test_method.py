"""A method from outside."""

import dataclasses

import pytest

import specedit
from specedit import SpecEditConfig
from specedit.method.schedule import Stage
from specedit.methods import Method
from specedit.methods.shared import outcome_of, run_stage, start_fine
from specedit.registry import methods
from specedit.testing import make_picture


@dataclasses.dataclass(frozen=True)
class Halves(Method):
    """Two stages at full resolution."""

    first: int = 1

    name = "halves"
    uses = frozenset({"steps"})

    @property
    def nfe(self):
        return self.first + 2

    def with_steps(self, n):
        return dataclasses.replace(self, first=n - 2)

    def refusal(self, adapter):
        return None if adapter.name == "toy" else "it only knows toys"

    def edit(self, run, edit_mask=None):
        groups = start_fine(run, Stage("full", 1.0, 0.0, self.nfe))
        run_stage(run, "halves", groups)
        return outcome_of(run, groups, edit_mask)


@pytest.fixture(autouse=True)
def halves():
    specedit.register_method(Halves)
    yield
    methods.unregister("halves")


def test_it_runs_by_its_name(toy):
    specedit.install(toy, method="halves", steps=(1, 1, 1))
    assert toy(make_picture(64, 64), "make it red", output_type="latent").images.isfinite().all()
    report = specedit.report(toy)
    assert (report.nfe, report.preset) == (3, "halves") and "halves" in [stage.name for stage in report.stages]
    assert SpecEditConfig(method="halves").with_steps(5).method == Halves(first=3)


def test_a_model_that_it_does_not_fit_is_left_as_it_was(pipe):
    stock = type(pipe)
    with pytest.raises(ValueError, match=r"^method: expected another one for flux-kontext, it only knows toys"):
        specedit.install(pipe, method="halves")
    assert type(pipe) is stock
    specedit.install(pipe, "turbo")
    with pytest.raises(ValueError, match=r"^method: "):
        specedit.install(pipe, method="halves")
    assert specedit.api.installing.installation_of(pipe).config.preset_name == "turbo"


def test_what_is_no_method_is_not_registered():
    class Own(Halves):
        name = "specedit"

    for wrong, error in ((3, TypeError), (type("Plain", (), {}), TypeError), (type("Sub", (Halves,), {}), TypeError)):
        with pytest.raises(error, match=r"^method: expected"):
            specedit.register_method(wrong)
    with pytest.raises(ValueError, match=r"^method: expected a new name, got 'specedit'"):
        specedit.register_method(dataclasses.dataclass(frozen=True)(Own))


def test_a_class_that_its_name_cannot_make_is_not_registered():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Needy(Halves):
        share: float

        name = "needy"

    with pytest.raises(TypeError, match=r"^method: expected defaults of all fields, got .*Needy'> without .* share"):
        specedit.register_method(Needy)

    @dataclasses.dataclass(frozen=True)
    class Unfinished(Method):
        name = "unfinished"

    with pytest.raises(TypeError, match=r"^method: expected a class that defines edit, nfe, with_steps, got .*Unfin"):
        specedit.register_method(Unfinished)
    assert "needy" not in methods and "unfinished" not in methods


def test_a_label_names_what_differs_from_the_defaults():
    @dataclasses.dataclass(frozen=True)
    class Listed(Halves):
        ends: list = dataclasses.field(default_factory=lambda: [1, 2])

        name = "listed"

    assert Listed().label == "listed" and Listed(ends=[1]).label == "listed, ends=[1]"


def test_specedit_itself_may_be_named_in_any_form():
    assert SpecEditConfig(method={"name": "specedit"}).method_options is None
    with pytest.raises(TypeError, match=r"^method: expected a name or options, such as Halves\(\), got the class"):
        SpecEditConfig(method=Halves)
