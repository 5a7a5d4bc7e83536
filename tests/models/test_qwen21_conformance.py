"""Qwen-Image-2.1's adapter against the conformance tests."""

import pytest
import torch

from specedit.models.qwen21 import QwenImage21
from specedit.testing import Conformance, Family


def rotations(pipe, run):
    """(tokens, D) complex: what the transformer rotated target and references by, without the axis of the text.

    The references are in the last call that computes them, which may have been before `run()`.
    """
    rope = pipe.transformer.pos_embed
    if not hasattr(rope, "seen"):
        rope.seen = {}

        def note(module, args, output):
            shapes, image = args[:2]
            table = output[image]
            own = shapes[-1][1] * shapes[-1][2]
            if len(shapes) > 1:
                rope.seen["references"] = table[:-own]
            rope.seen["target"] = table[-own:]

        rope.register_forward_hook(note)
    run()
    table = torch.cat([rope.seen["target"], rope.seen["references"]])
    return table[:, table.shape[1] * rope.axes_dim[0] // sum(rope.axes_dim) :]


@pytest.mark.skipif(QwenImage21 is None, reason="this diffusers has no QwenImage21Pipeline")
@pytest.mark.thorough  # tests/models/qwen21 has quick tests
class TestQwenImage21(Conformance):
    """Sides are multiples of two tokens. Padding moves the target, so the prompts of a batch have one length."""

    @pytest.fixture
    def family(self, make_qwen21, picture):
        def call(height, width):
            return dict(
                image=picture(height, width), prompt="make it red", height=height, width=width, output_resolution=128
            )

        return Family(
            QwenImage21, make_qwen21, call, guided=dict(negative_prompt="blue", true_cfg_scale=2.5),
            batch=lambda n: dict(prompt=["make it red", "now a tower"][:n]), ropes=("scaled",), rotations=rotations,
            sends_values=True,
        )  # fmt: skip
