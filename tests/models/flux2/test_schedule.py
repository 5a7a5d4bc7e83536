"""FLUX.2's schedule: the shift depends on the tokens and on the number of steps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import specedit
from specedit.models import flux2

if flux2.Flux2Dev is None:
    pytest.skip("this diffusers has no FLUX.2", allow_module_level=True)

from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from specedit.models.flux2.schedule import MOST_STEPS, flux2_sigmas, whole_steps


def scheduler(**changes):
    return FlowMatchEulerDiscreteScheduler(**dict(shift=3.0, use_dynamic_shifting=True) | changes)


@pytest.mark.parametrize("changes", [{}, dict(time_shift_type="linear"), dict(use_dynamic_shifting=False)], ids=str)
@pytest.mark.parametrize("tokens", [64, 4096, 6000])
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_the_whole_schedule_is_stocks(tokens, steps, changes):
    stock = scheduler(**changes)
    stock.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    torch.testing.assert_close(
        flux2_sigmas(scheduler(**changes), tokens, 1.0, 0.0, steps), stock.sigmas, rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("tokens", [64, 4096, 6000])
def test_a_part_has_the_sigmas_of_the_whole(tokens):
    whole = flux2_sigmas(scheduler(), tokens, 1.0, 0.0, 28)
    for first, last in ((0, 10), (6, 20), (20, 28)):
        part = flux2_sigmas(scheduler(), tokens, whole[first].item(), whole[last].item(), last - first)
        torch.testing.assert_close(part, whole[first : last + 1], rtol=0, atol=1e-4)


def test_steps_of_the_whole_are_bounded():
    assert whole_steps(scheduler(), 4096, 1.0, 0.0, 300) == 300
    assert whole_steps(scheduler(), 4096, 0.5, 0.4999, 3) == MOST_STEPS
    for start, end in ((1.0, 0.9999), (0.5, 0.4999), (0.001, 0.0)):
        sigmas = flux2_sigmas(scheduler(), 256, start, end, 3)
        assert (sigmas.diff() < 0).all() and sigmas[0] == np.float32(start) and sigmas[-1] == np.float32(end)


def test_a_run_takes_it(family):
    pipe = specedit.install(family.make(), steps=(2, 2, 2), draft_steps=3)
    family.run(pipe)
    stages = {stage.name: stage for stage in specedit.report(pipe).stages if stage.steps}
    draft, full = stages["draft"], stages["full"]
    assert (draft.sigma_start, draft.sigma_end, full.sigma_end) == (1.0, 0.0, 0.0)
    own = family.adapter().sigmas(SimpleNamespace(scheduler=pipe.scheduler), 64, full.sigma_start, 0.0, 2)
    other = flux2_sigmas(pipe.scheduler, 64, full.sigma_start, 0.0, 2)
    assert torch.equal(own, other)
    assert family.adapter().schedule_refusal(pipe) is None


def test_other_schedulers_run_stock(family):
    pipe = family.make()
    pipe.scheduler = scheduler(use_karras_sigmas=True)
    with pytest.warns(UserWarning, match="SpecEdit will run the stock pipeline: the scheduler sets use_karras_sigmas"):
        specedit.install(pipe)
