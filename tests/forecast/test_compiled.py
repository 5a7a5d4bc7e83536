"""A compiled block beside what keeps keys, values or outputs from step to step, all on one pipeline."""

import pytest
import torch

import specedit
from specedit.methods import Sparge, SpotEdit
from tests.methods.common import mask_of

MASK = dict(edit_mask=mask_of((0, 0), (0, 1), (1, 0), (1, 1)))
CASES = {
    "kept reference": (dict(steps=(0, 2, 0), reference_refresh=2), MASK),
    "taylor": (dict(steps=(0, 0, 4), forecast="taylor", forecast_order=1, forecast_interval=2), MASK),
    "toca": (dict(steps=(0, 4, 0), forecast="toca", forecast_interval=2), MASK),
    "spotedit": (dict(method=SpotEdit(count=4, initial=2, resets=())), dict(edit_mask=mask_of((0, 0)))),
    "sparge": (dict(method=Sparge(count=2, top=0.4, theta=-1)), {}),
}
FIRST = ("kept reference", "taylor")
NAMES = [name if name in FIRST else pytest.param(name, marks=pytest.mark.thorough) for name in CASES]


@pytest.fixture(scope="module")
def compiled(make_pipe):
    """Its double blocks are compiled; single blocks keep keys, values and outputs in the same way.

    Beyond the limit of graphs blocks would run eagerly, and the tests would show nothing.
    """
    torch._dynamo.reset()
    pipe = make_pipe()
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield pipe
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_compiling_changes_nothing(compiled, pipe, edit, name):
    settings, call = CASES[name]
    expected = edit(specedit.install(pipe, **settings), **call)
    got = edit(specedit.install(compiled, **settings), **call)
    report = specedit.report(compiled)
    specedit.uninstall(compiled)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert report.cached_steps > 0 or "forecast" not in settings
    assert any(stage.reused for stage in report.stages) or "reference_refresh" not in settings
