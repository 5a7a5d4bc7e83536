import numpy as np
import pytest
import torch

import specedit
from specedit.api import inputs

NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(guidance_scale=NAN), "guidance_scale: expected a finite number, got nan"),
        (dict(true_cfg_scale=-np.float32("inf")), "true_cfg_scale: expected a finite number, got -inf"),
        (dict(joint_attention_kwargs={"scale": NAN}), r"joint_attention_kwargs\['scale'\]: expected a finite number"),
        (dict(latents=torch.full((1, 4, 4), NAN, dtype=torch.bfloat16)), "latents: expected finite values"),
        (dict(prompt_embeds=torch.full((1, 4), NAN).to(torch.float8_e4m3fn)), "prompt_embeds: expected finite values"),
        (dict(image=np.full((64, 64, 3), NAN)), "image: expected finite values"),
        (dict(image=[np.zeros((64, 64, 3)), torch.full((3, 64, 64), NAN)]), r"image\[1\]: expected finite values"),
    ],
)
def test_what_is_not_finite_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        inputs.check(call, None, specedit.SpecEditConfig())


def test_everything_else_passes():
    call = dict(
        prompt="red", height=10**400, guidance_scale=3.5, generator=torch.Generator(), latents=None, flag=True,
        latents_meta=torch.ones(2, device="meta"), ids=torch.ones(2, dtype=torch.int64), names=np.array(["a"]),
    )  # fmt: skip
    assert inputs.check(call, None, specedit.SpecEditConfig()) is None


@pytest.mark.parametrize("kind", [torch.from_numpy, np.array])
def test_nan_in_the_picture_is_refused_before_any_work(pipe, edit, count_calls, kind):
    calls = count_calls(pipe.text_encoder)
    specedit.install(pipe, steps=(1, 1, 1), draft_steps=1)
    values = np.full((3, 128, 128), NAN, np.float32)
    with pytest.raises(ValueError, match="image: expected finite values, got NaN or infinity"):
        edit(pipe, image=kind(values if kind is torch.from_numpy else values.transpose(1, 2, 0)))
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(height="a"), "height: expected an integer or None, got 'a'"),
        (dict(width=128.5), "width: expected an integer or None, got 128.5"),
        (dict(num_images_per_prompt="2"), "num_images_per_prompt: expected an integer, got '2'"),
        (dict(max_sequence_length=True), "max_sequence_length: expected an integer, got True"),
        (dict(guidance_scale=None), "guidance_scale: expected a number, got None"),
        (dict(true_cfg_scale="a"), "true_cfg_scale: expected a number, got 'a'"),
        (dict(latents=np.zeros((1, 64, 64))), "latents: expected a tensor or None, got ndarray"),
        (dict(generator=3), "generator: expected a torch.Generator or a list of them, got 3"),
        (dict(generator=[torch.Generator(), None]), "generator: .* got None"),
    ],
)
def test_arguments_of_a_wrong_type_are_named_before_any_work(pipe, edit, count_calls, arguments, message):
    calls = count_calls(pipe.text_encoder)
    specedit.install(pipe, steps=(1, 1, 1), draft_steps=1)
    with pytest.raises(TypeError, match=message):
        edit(pipe, **arguments)
    assert not calls
