"""What callers of the Qwen pipelines do."""

import threading

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline
from PIL import Image

import specedit
from specedit.models.qwen.edit import QwenImageEdit, QwenImageEditPlus
from specedit.testing.family import trace
from tests.models.qwen.common import GUIDED, QUICK, Taps, close


def test_many_images_of_one_prompt_with_generators(edit):
    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    stock = edit.run(edit.make(), num_inference_steps=2, num_images_per_prompt=2, generator=generators(), **GUIDED)
    pipe = specedit.install(edit.make(), steps=(0, 0, 2))
    close(edit.run(pipe, num_images_per_prompt=2, generator=generators(), **GUIDED), stock)
    assert (stock[0] - stock[1]).abs().max() > 0.1


def test_callbacks(edit):
    heard = []

    def callback(pipe, index, timestep, given):
        heard.append((index, given["latents"].shape, given["prompt_embeds"].shape))
        return {"latents": given["latents"] * 0} if index == 3 else {}

    pipe = specedit.install(edit.make(), **QUICK)
    names = ["latents", "prompt_embeds"]
    tokens = edit.run(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, **GUIDED)
    assert [index for index, *_ in heard] == [0, 1, 2, 3]
    assert {shape for _, shape, _ in heard} == {(1, 64, 16)} and (tokens == 0).all()
    length = heard[0][2][1]

    def other_prompt(pipe, index, timestep, given):
        return {"prompt_embeds": torch.zeros(1, length, 16)}

    plain, changed = (edit.run(pipe, callback_on_step_end=each) for each in (None, other_prompt))
    assert (plain - changed).abs().max() > 1e-4


@pytest.mark.slow
def test_two_threads(edit, plus):
    pipes = [specedit.install(family.make(), **QUICK) for family in (edit, plus, edit)]
    families = [edit, plus, edit]
    expected = [
        family.run(pipe, seed=i, **GUIDED) for i, (family, pipe) in enumerate(zip(families, pipes, strict=True))
    ]
    results = [None] * 3

    def work(i):
        results[i] = families[i].run(pipes[i], seed=i, **GUIDED)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_an_exception_leaves_the_pipeline_usable(edit):
    pipe = edit.make()
    before, kept = edit.run(pipe, num_inference_steps=2), trace(pipe)
    specedit.install(pipe, **QUICK)

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        edit.run(pipe, callback_on_step_end=fail)
    specedit.uninstall(pipe)
    assert torch.equal(edit.run(pipe, num_inference_steps=2), before)
    assert trace(pipe)[0] is kept[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(image=None), TypeError, "image: expected a PIL image or a list of them, got NoneType"),
        (dict(image=[]), ValueError, "image: expected at least one picture, got an empty list"),
        (dict(image=np.zeros((128, 128, 3))), TypeError, "image: expected a PIL image or a list of them, got ndarray"),
        (dict(image=Image.new("RGBA", (128, 128))), ValueError, "image: expected an RGB picture, got mode 'RGBA'"),
        (dict(image=Image.new("RGB", (64, 9000))), ValueError, "image: expected sides less unequal, got 64 x 9000"),
        (dict(image=[Image.new("RGB", (99, 99))] * 2), ValueError, "image: expected one picture .* fit 1 edits, got 2"),
        (dict(height=8), ValueError, "height: expected at least 16 px, got 8"),
        (dict(prompt=None), ValueError, "Provide either `prompt` or `prompt_embeds`"),
        (dict(prompt=3), ValueError, "`prompt` has to be of type `str` or `list`"),
        (dict(latents=torch.zeros(1, 9, 16)), ValueError, r"latents: expected shape \(1, 64, 16\), got \(1, 9, 16\)"),
        (
            dict(prompt=["a", "b"], **GUIDED | {"negative_prompt": ["c", "d", "e"]}),
            ValueError,
            "negative_prompt: expected 2, one for each prompt, got 3",
        ),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), ValueError, "callback_on_step_end_tensor_inputs"),
    ],
)
def test_bad_input(edit, picture, changes, error, message):
    pipe = specedit.install(edit.make(), **QUICK)
    if changes.get("prompt") == ["a", "b"]:
        changes = changes | {"image": [picture(), picture()]}
    with pytest.raises(error, match=message):
        edit.run(pipe, **changes)


def test_several_prompts_of_plus_are_left_to_its_stock_call(plus):
    def outcome(pipe):
        try:
            return plus.run(pipe, prompt=["a", "b"], num_inference_steps=2)
        except Exception as error:  # newer versions of diffusers refuse them
            return str(error)

    stock, pipe = outcome(plus.make()), specedit.install(plus.make(), **QUICK)
    with pytest.warns(UserWarning, match="2 prompts in one call, and the pipeline takes one"):
        got = outcome(pipe)
    assert got == stock if isinstance(stock, str) else torch.equal(got, stock)


def test_a_list_of_one_picture_is_stocks(edit, picture):
    """The vision-language encoder sees the pictures of a list as they are, a single one at the pipeline's size."""
    listed, single = dict(image=[picture(256, 256)]), dict(image=picture(256, 256))
    stock = [edit.run(edit.make(), num_inference_steps=2, **image) for image in (listed, single)]
    pipe = specedit.install(edit.make(), steps=(0, 0, 2))
    for image, expected in zip((listed, single), stock, strict=True):
        close(edit.run(pipe, **image), expected)
    assert (stock[0] - stock[1]).abs().max() > 1e-3


@pytest.mark.slow
def test_several_images_of_several_prompts(edit, picture):
    """Each prompt keeps its own words, however many another one has."""
    prompts, image = ["red", "make it large and blue"], picture()
    pipe = specedit.install(edit.make(), **QUICK)

    def run(seeds, **call):
        return edit.run(pipe, generator=[torch.Generator().manual_seed(seed) for seed in seeds], **call)

    together = run(range(4), image=[image] * 2, prompt=prompts, num_images_per_prompt=2)
    for row in range(4):
        alone = run([row], image=[image], prompt=prompts[row // 2 : row // 2 + 1])
        close(together[row], alone[0])


def test_an_engine_of_another_kind_runs_stock(edit):
    pipe = edit.make()
    model, pipe.transformer = pipe.transformer, torch.nn.Linear(1, 1)  # such as a quantised one with its own kernels
    specedit.install(pipe, **QUICK)
    assert "Linear takes no processors of ours" in QwenImageEdit().refusal(pipe, {}, "auto")
    specedit.uninstall(pipe)
    pipe.transformer = model
    assert edit.run(specedit.install(pipe, **QUICK)).isfinite().all()


def test_what_cannot_be_accelerated_runs_stock_with_a_reason(edit):
    pipe = edit.make()
    stock = edit.run(pipe, sigmas=[1.0, 0.5], num_inference_steps=2)
    specedit.install(pipe, **QUICK)
    with pytest.warns(UserWarning, match="sigmas were given"):
        assert torch.equal(edit.run(pipe, sigmas=[1.0, 0.5], num_inference_steps=2), stock)
    pipe.transformer.register_to_config(guidance_embeds=True)
    assert "guidance-distilled" in QwenImageEdit().refusal(pipe, {}, "auto")


@pytest.mark.slow
def test_adapters_know_their_own_pipelines(edit, plus):
    for make, adapter in ((edit.make, QwenImageEdit), (plus.make, QwenImageEditPlus)):
        matching = [each for each in specedit.models.adapters() if each.matches(make())]
        assert matching == [adapter]
    assert QwenImageEditPipeline.__name__ in QwenImageEdit.pipelines


@pytest.mark.slow
def test_frames_that_are_not_there_are_not_convolved(edit):
    pipe = edit.make()

    def parts():  # but for the autoencoder itself, which counts its frames
        return {name: set(vars(module)) for name, module in pipe.vae.named_modules() if name}

    def taps():
        with Taps() as taps:
            pipe(**edit.call(128, 128), num_inference_steps=10, output_type="np", **GUIDED)
        return [n for n in taps.seen if n == 3]  # the vision encoder's have two

    before, stock = parts(), taps()
    specedit.install(pipe, "turbo")
    ours = taps()
    specedit.uninstall(pipe)
    assert len(stock) > 10 and ours == []
    assert taps() == stock
    assert parts() == before
