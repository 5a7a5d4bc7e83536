"""A plan of another method counts what its report counts, to the digit, or says by name why it cannot."""

import dataclasses

import pytest
import torch

import specedit
from specedit import SpecEditConfig
from specedit.cost.flops import plan
from specedit.cost.tables import ModelCost
from specedit.method_options import Method
from specedit.methods import Bottleneck, Fresco, Ralu, RegionE, Sparge, Speed, SpotEdit, Steps
from tests.methods.common import GUIDED, mask_of
from tests.models.planned import assert_as_planned

SIZES = ((128, 128), (144, 112))  # the second of odd sides, in tokens
KNOWN = [
    Steps(count=3), Ralu(steps=(1, 2, 1)), Ralu.at("7x"), Fresco(steps=(2, 1, 1)), Bottleneck(steps=(1, 2, 1)),
    Speed(count=6), Speed(count=1), Speed(count=8, delta=0.2), Sparge(count=2, tau=1.0), Sparge(count=2, top=1.0),
]  # fmt: skip
REGIONS = [SpotEdit(count=9), SpotEdit(count=6, initial=2, resets=(4,), fusion="none"), RegionE(count=9), RegionE()]
MASK = mask_of((0, 0), (1, 1), (1, 2))


@pytest.fixture
def compare(request, picture):
    """Runs a method, and compares its report with the plan."""

    def check(family, method, mask=None, size=SIZES[0], guided=False):
        height, width = size
        call = dict(image=picture(height, width), prompt="make it red", output_type="latent")
        if family == "flux":
            pipe = request.getfixturevalue("make_pipe")()
            call |= dict(
                height=height, width=width, max_area=height * width, _auto_resize=False, max_sequence_length=16
            )
        else:
            pipe = request.getfixturevalue("make_qwen")()
        specedit.install(pipe, method=method)
        call |= GUIDED if guided else {}
        report = pipe(**call, edit_mask=mask, generator=torch.Generator().manual_seed(0)).report
        texts = [16] if family == "flux" else qwen_texts(pipe, call)
        cost = ModelCost(
            pipe.transformer.config, texts[0], 2 if guided else 1, scheduler=pipe.scheduler.config,
            negative_text_tokens=texts[-1], adapter="qwen-image-edit" if family == "qwen" else "",
        )  # fmt: skip
        cells = dict(edit_fraction=0.3) if mask is None else dict(cells=report.edit_mask)
        config = SpecEditConfig(method=method)
        planned = plan(config, cost, height, width, **cells, drafts=mask is None)
        if planned["flops"] != report.flops:  # on odd sides it matters which cells are split
            assert height % 32 and mask is None
            planned = plan(config, cost, height, width, cells=report.expand_mask)
        assert_as_planned(report, planned)
        assert report.nfe == planned["nfe"]

    return check


def qwen_texts(pipe, call):
    """Text tokens of both prompts."""
    counts = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    with specedit.disabled(pipe):
        pipe(**call, num_inference_steps=1)
    handle.remove()
    return counts


@pytest.mark.parametrize("method", KNOWN, ids=lambda method: method.label)
@pytest.mark.parametrize("size", SIZES)
def test_methods_whose_schedule_is_known(compare, method, size):
    compare("flux", method, size=size)


@pytest.mark.parametrize("method", REGIONS, ids=lambda method: method.label)
@pytest.mark.parametrize("size", SIZES)
def test_methods_of_regions_with_a_mask(compare, method, size):
    compare("flux", method, MASK, size=size)


@pytest.mark.parametrize("method", [SpotEdit(count=6), RegionE(count=6)], ids=lambda method: method.label)
def test_a_mask_of_everything(compare, method):
    compare("flux", method, torch.ones(8, 8))


@pytest.mark.parametrize("method", [Ralu(steps=(1, 2, 1)), RegionE(), SpotEdit(count=9)], ids=lambda m: m.name)
def test_guided_models_with_settings_of_their_own(compare, method):
    compare("qwen", method, MASK if method.takes_mask else None, guided=True)


def test_every_method_is_planned_or_refused_by_name():
    for name in ("spotedit", "regione"):
        with pytest.raises(ValueError, match=f"method: '{name}' finds what is edited while it runs"):
            plan(SpecEditConfig(method=name), "flux-kontext", 1024, 1024, 0.2)
        with pytest.raises(ValueError, match=r"method: expected another one, because .* computes all tokens or none"):
            plan(SpecEditConfig(method=name), "flux2-klein-9b-kv", 1024, 1024, 0.2, drafts=False)
        with pytest.raises(ValueError, match="edit_fraction: expected a number from 0 to 1, got None"):
            plan(SpecEditConfig(method=name), "flux-kontext", 1024, 1024, drafts=False)
    with pytest.raises(ValueError, match=r"method: 'sparge' reads as many blocks .* got sparge"):
        plan(SpecEditConfig(method="sparge"), "flux-kontext", 1024, 1024)
    for name in ("steps", "ralu", "fresco", "bottleneck", "speed"):
        assert plan(SpecEditConfig(method=name), "flux-kontext", 1024, 1024)["flops"] > 0
    own = plan(SpecEditConfig(method="steps"), "flux-kontext", 1024, 1024, num_inference_steps=50)
    assert own["nfe"] == 50 and own["flops"] < own["flops_stock"]  # but for what the last block need not compute
    with pytest.raises(ValueError, match=r"strength: expected 1 with method='ralu', got 0\.5"):
        plan(SpecEditConfig(method="ralu"), "flux-kontext", 1024, 1024, strength=0.5)


def test_a_method_that_plans_nothing_says_so():
    @dataclasses.dataclass(frozen=True)
    class Mine(Method):
        name = "mine"
        nfe = 3

        def with_steps(self, n):
            return self

        def edit(self, run, edit_mask=None):
            raise NotImplementedError

    with pytest.raises(ValueError, match="method: expected one whose cost is known beforehand, got 'mine'"):
        plan(SpecEditConfig(method=Mine()), "flux-kontext", 1024, 1024)
