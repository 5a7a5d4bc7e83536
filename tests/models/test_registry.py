"""Adapters register themselves, and the most specific one serves a pipeline."""

import importlib
import sys
from types import SimpleNamespace

import pytest

from specedit.batch import prediction
from specedit.cost.tables import MODELS
from specedit.method.adapter import Adapter
from specedit.models import adapter_of, adapters, longcat, register_adapter
from specedit.models.flux import FluxKontext
from specedit.models.registry import ADAPTERS, released_models
from specedit.released import Released


@pytest.fixture
def register():
    """Registers adapters for the length of a test."""
    names = []

    def register(cls):
        names.append(cls.name)
        return register_adapter(cls)

    yield register
    for name in names:
        ADAPTERS.unregister(name)


def derived(name, base=FluxKontext, **members):
    return type("Derived", (base,), {"name": name, **members})


def test_built_in_adapters_are_listed_by_name():
    names = [adapter.name for adapter in adapters()]
    assert names == sorted(names) and {"flux-kontext", "qwen-image-edit", "qwen-image-edit-plus"} <= set(names)
    assert ("longcat-image-edit" in names) == (longcat.LongCatImageEdit is not None)


def test_a_subclass_wins_over_its_base_in_any_order(pipe, register):
    assert type(adapter_of(pipe)) is FluxKontext
    middle = derived("test-middle")
    bottom = derived("test-bottom", middle)
    for adapter in (bottom, middle):
        register(adapter)
    assert type(adapter_of(pipe)) is bottom


def test_of_unrelated_adapters_the_last_one_wins(pipe, register):
    first, second = derived("test-first"), derived("test-second")
    register(first)
    assert type(adapter_of(pipe)) is first
    register(second)
    assert type(adapter_of(pipe)) is second


def test_an_adapter_that_does_not_match_serves_nothing(pipe, register):
    register(derived("test-elsewhere", matches=staticmethod(lambda pipe: False)))
    assert type(adapter_of(pipe)) is FluxKontext and adapter_of(object()) is None


def test_registering_returns_the_class_and_is_idempotent(register):
    cls = derived("test-twice")
    assert register(cls) is cls and register(cls) is cls


def test_what_is_no_adapter_is_refused():
    for wrong in (None, "flux", object, FluxKontext()):
        with pytest.raises(TypeError, match=r"adapter: expected a subclass of .*Adapter, got"):
            register_adapter(wrong)
    with pytest.raises(TypeError, match="expected Half to define every abstract method, got none for attach, "):
        register_adapter(type("Half", (Adapter,), {"name": "half", "pipelines": "HalfPipeline"}))
    with pytest.raises(TypeError, match=r"expected Derived.name as a string, got None"):
        register_adapter(derived(None))
    with pytest.raises(ValueError, match="expected a new name, got 'flux-kontext'"):
        register_adapter(derived("flux-kontext"))
    assert type(ADAPTERS["flux-kontext"]) is type(FluxKontext) and ADAPTERS["flux-kontext"] is FluxKontext


def test_a_family_whose_pipeline_is_missing_is_absent(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", SimpleNamespace())
        assert importlib.reload(longcat).LongCatImageEdit is None
    importlib.reload(longcat)


def test_every_adapter_states_its_released_models_or_says_why_not():
    known = {one.cost for adapter in adapters() for one in adapter.released}
    assert known == set(MODELS)
    for adapter in adapters():
        assert bool(adapter.released) != bool(adapter.uncosted), adapter.name
    classes = {name.strip() for adapter in adapters() for name in adapter.pipelines.split(",") if adapter.released}
    assert classes == set(released_models()) and "FluxKontextInpaintPipeline" in classes


def test_an_adapter_outside_the_package_adds_its_models_to_the_prediction(register):
    model = Released("flux2-dev", "Tiny", ("owner/tiny",))
    register(derived("tiny", pipelines="TinyPipeline", released=(model,)))
    assert prediction.cost_of("owner/tiny").name == "flux2-dev"
