"""An adapter outside the package passes the tests of those inside."""

import pytest

import specedit
from specedit.method.adapter import Adapter
from specedit.models import adapter_of
from specedit.testing import Conformance, Family, make_picture
from tests.extension.toy_adapter import ToyAdapter


class TestToy(Conformance):
    @pytest.fixture
    def family(self, make_toy):
        def call(height, width):
            return dict(image=make_picture(height, width), prompt="make it red")

        return Family(
            ToyAdapter, make_toy, call, others=(), ropes=("scaled",), parts=("transformer", "vae"), rotations=None,
            fullgraph=False,
        )  # fmt: skip


def test_it_is_found_by_its_pipeline(toy):
    assert isinstance(adapter_of(toy), ToyAdapter)
    assert specedit.size_for(toy, make_picture(64, 64)) == {}


def test_a_call_that_the_adapter_does_not_name_runs_stock(toy, monkeypatch):
    monkeypatch.setattr(ToyAdapter, "calls", ())
    specedit.install(toy, "turbo")
    with pytest.warns(UserWarning, match="ToyPipeline has a __call__ of its own"):
        toy(make_picture(64, 64), "make it red", output_type="latent")


def test_a_schedule_that_the_adapter_does_not_name_runs_stock(toy, monkeypatch):
    monkeypatch.delattr(ToyAdapter, "schedule_refusal")
    with pytest.warns(UserWarning, match="the scheduler is NoneType, not FlowMatchEulerDiscreteScheduler"):
        specedit.install(toy, "turbo")


@pytest.mark.parametrize("wrong", [3, type("Other", (), {}), Adapter])
def test_what_is_no_adapter_is_not_registered(wrong):
    with pytest.raises(TypeError, match=r"^adapter: expected"):
        specedit.register_adapter(wrong)


def test_a_rope_that_the_adapter_does_not_have_is_an_error_before_any_work(toy):
    specedit.install(toy, rope="phase_aligned")
    toy.transformer.forward = None
    with pytest.raises(ValueError, match=r"^rope: expected 'scaled' for toy, got 'phase_aligned'"):
        toy(make_picture(64, 64), "make it red")
