"""Several threads edit with one pipeline: what a call uses is its own, or used in turn."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import specedit
from specedit.models.longcat import LongCatImageEdit

THREADS, REQUESTS = 4, 5


def each_its_own(pipe, call):
    """Every request in every thread gives the picture and the report of the same request alone."""
    specedit.install(pipe, steps=(0, 0, 1))
    alone = [call(pipe, steps) for steps in range(1, THREADS + 1)]

    def work(thread):
        for i in range(REQUESTS):
            steps = 1 + (thread + i) % THREADS
            output = call(pipe, steps)
            assert output.report.nfe == steps and specedit.report(pipe) is output.report
            torch.testing.assert_close(output.images, alone[steps - 1].images, rtol=1e-4, atol=1e-4)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))


@pytest.mark.slow
def test_qwen(make_qwen, picture):
    def call(pipe, steps):
        return pipe(
            image=picture(64, 64, steps), prompt="make it red", height=64, width=64, num_inference_steps=steps,
            output_type="pt", generator=torch.Generator().manual_seed(steps),
        )  # fmt: skip

    each_its_own(make_qwen(), call)


@pytest.mark.slow
@pytest.mark.skipif(LongCatImageEdit is None, reason="this diffusers has no LongCatImageEditPipeline")
def test_longcat(make_longcat, picture):
    """Half of the requests are guided, and the pipeline's own guidance scale is the last one's."""

    def call(pipe, steps):
        return pipe(
            image=picture(64, 64, steps), prompt="make it red", guidance_scale=1.0 + steps % 2,
            num_inference_steps=steps, output_type="pt", generator=torch.Generator().manual_seed(steps),
        )  # fmt: skip

    each_its_own(make_longcat(), call)
