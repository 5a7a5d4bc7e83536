"""A temporal cache from outside, and what its options are checked for."""

import copy
import dataclasses
import json
import pickle

import pytest

import specedit
from specedit import SpecEditConfig
from specedit.forecast import Forecaster, ForecastOptions, Taylor
from specedit.registry import forecasts
from specedit.testing import make_picture

ALONE = dict(steps=(0, 0, 8))
observed = []


class FadeForecaster(Forecaster):
    """The last feature, a little smaller every step."""

    def __init__(self, interval, share, **more):
        self.share = share
        super().__init__(interval, **more)

    def reset(self):
        super().reset()
        self.feature = None

    def tensors(self):
        return [] if self.feature is None else [self.feature]

    def _observe(self, step, feature, sigma):
        observed.append(step)
        self.feature = feature

    def _predict(self, step, sigma):
        return self.feature * self.share ** (step - self.last)


@dataclasses.dataclass(frozen=True)
class Fade(ForecastOptions):
    share: float = 0.5

    name = "fade"

    def validate(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected a number above 0, at most 1, got {self.share!r}")

    def prepare(self, pipe):
        if pipe.transformer.config.in_channels != 16:
            raise ValueError("fade: expected 16 channels")

    def make(self, context):
        assert context.layout.is_fine and context.warmup == 3
        return FadeForecaster(self.interval, self.share, warmup=context.warmup, backend=context.backend)

    def operations(self, numbers):
        return 7.0 * numbers


@pytest.fixture(autouse=True)
def fade():
    specedit.register_forecast(Fade)
    observed.clear()
    yield
    forecasts.unregister("fade")


def call(pipe, **more):
    return pipe(make_picture(64, 64), "make it red", output_type="latent", **more).images


@pytest.mark.parametrize("fields", [dict(forecast="fade"), dict(forecast=Fade()), dict(forecast=Fade(share=0.9))])
def test_it_runs_by_name_and_by_options(toy, fields):
    specedit.install(toy, **ALONE)
    call(toy)
    whole = specedit.report(toy)
    specedit.install(toy, **ALONE, **fields)
    assert call(toy).isfinite().all()
    report = specedit.report(toy)
    assert observed == [0, 1, 2, 6] and report.cached_steps == 4
    assert report.flops == whole.flops / 2 + 4 * 7 * 16 * 16
    assert report.cache_bytes == 16 * 16 * 4


def test_its_cost_is_predicted():
    config = SpecEditConfig(**ALONE, forecast=Fade(interval=2))
    predicted = specedit.flops.plan(config, "flux-kontext", 1024, 1024, 0.2)
    whole = specedit.flops.plan(SpecEditConfig(**ALONE), "flux-kontext", 1024, 1024, 0.2)
    assert predicted["stages"][0]["cached"] == 3
    assert predicted["flops"] == pytest.approx(whole["flops"] * 5 / 8 + 3 * 7 * 4096 * 64)


def test_what_prepare_refuses_is_refused_before_any_work(toy, monkeypatch):
    def refuse(self, pipe):
        raise ValueError("weights: expected a file, got none")

    monkeypatch.setattr(Fade, "prepare", refuse)
    stock = type(toy)
    with pytest.raises(ValueError, match="weights: expected a file, got none"):
        specedit.install(toy, forecast="fade")
    assert type(toy) is stock


def test_options_are_values():
    config = SpecEditConfig(forecast=Taylor(interval=3, order=1))
    same = SpecEditConfig(forecast=Taylor(3, 1))
    assert config == same and hash(config) == hash(same) and config != SpecEditConfig(forecast=Taylor(3, 2))
    assert (
        config.forecast_options
        == SpecEditConfig(forecast="taylor", forecast_interval=3, forecast_order=1).forecast_options
    )
    assert repr(config.forecast) == "Taylor(interval=3, order=1, basis='taylor')"
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config, dilation=1)):
        assert copied == config and copied.forecast_options == config.forecast
    assert "forecast=Taylor" in config.name


def test_a_configuration_survives_json(toy):
    config = SpecEditConfig(forecast=Fade(interval=2), **ALONE)
    written = json.loads(json.dumps(dataclasses.asdict(config)))
    assert written["forecast"] == {"interval": 2, "name": "fade", "share": 0.5}
    assert SpecEditConfig(**written) == config
    specedit.install(toy, config)
    call(toy)
    assert specedit.report(toy).to_dict()["config"]["forecast"] == written["forecast"]
    json.dumps(specedit.report(toy).to_dict())


def test_fewer_steps_shorten_the_interval_or_leave_the_forecast_out(toy):
    config = SpecEditConfig(forecast=Fade(interval=6))
    fewer = config.with_steps(9)
    assert fewer.steps == (4, 3, 2) and fewer.forecast == Fade(interval=4)
    assert config.with_steps(3).forecast is None and config.with_steps(18) == config


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(forecast="fado"), ValueError, "forecast: expected None or one of .*'fade'.*did you mean 'fade'"),
        (dict(forecast=Fade), ValueError, "forecast: expected None or one of"),
        (dict(forecast="fade", forecast_order=2), ValueError, "forecast_order: expected None, forecast='fade' has no"),
        (
            dict(forecast=Fade(), forecast_interval=3),
            ValueError,
            r"forecast_interval: expected None beside options, forecast=Fade\(.*got 3",
        ),
        (dict(forecast=Fade(interval=8)), ValueError, "forecast_interval: expected at most 7"),
        (
            dict(forecast={"name": "fade", "shar": 1}),
            TypeError,
            r"expected fields of Fade \(interval, share\), got 'shar'",
        ),
        (dict(forecast={"interval": 3}), ValueError, "forecast: expected one of .*, got None"),
        (dict(forecast=Taylor(order=6)), ValueError, "'taylor' needs 7 full steps"),
    ],
)
def test_configurations_that_make_no_sense(fields, error, message):
    with pytest.raises(error, match=message):
        SpecEditConfig(**fields)


@pytest.mark.parametrize(
    ("name", "fields", "error", "message"),
    [
        ("Fade", dict(share=2), ValueError, "share: expected a number above 0"),
        ("Taylor", dict(interval=1), ValueError, "interval: expected an integer of at least 2, got 1"),
        ("Taylor", dict(order=0), ValueError, "order: expected an integer of at least 1, got 0"),
        ("Taylor", dict(order=1, basis="newton"), ValueError, "basis: expected 'taylor' with order=1"),
        ("Taylor", dict(basis="bernstein"), ValueError, "basis: expected 'taylor' or 'newton'"),
        ("Hermite", dict(scale=0), ValueError, "scale: expected a number above 0, at most 1, got 0"),
        ("FreqCa", dict(cutoff="low"), TypeError, "cutoff: expected a number above 0, at most 1, got 'low'"),
        ("ToCa", dict(fresh_ratio=0), ValueError, "fresh_ratio: expected a number above 0"),
        ("ToCa", dict(staleness_weight=-1), ValueError, "staleness_weight: expected a number of at least 0"),
        ("ToCa", dict(fresh_ratio=1, staleness_weight=2), ValueError, "staleness_weight: expected the default"),
        ("DuCa", dict(interval=2, fresh_ratio=0.2), ValueError, "fresh_ratio: expected the default with interval=2"),
        ("Lesa", dict(weights=3), TypeError, "weights: expected a file name or None, got 3"),
    ],
)
def test_options_that_make_no_sense(name, fields, error, message):
    with pytest.raises(error, match=f"^{message}"):
        getattr(specedit.forecast, name)(**fields)


def test_what_is_no_forecast_is_not_registered():
    with pytest.raises(TypeError, match="expected a class that derives from ForecastOptions, got 'fade'"):
        specedit.register_forecast("fade")
    with pytest.raises(TypeError, match=r"expected a class with @dataclass\(frozen=True\) below the decorator"):
        specedit.register_forecast(type("Bare", (Fade,), {"name": "bare"}))
    again = dataclasses.make_dataclass("Again", [], bases=(Fade,), namespace={"name": "fade"}, frozen=True)
    with pytest.raises(ValueError, match=r"forecast: expected a new name, got 'fade', which .*Fade.* has"):
        specedit.register_forecast(again)
    with pytest.raises(AttributeError, match="has no attribute 'Tailor'"):
        specedit.forecast.Tailor  # noqa: B018
