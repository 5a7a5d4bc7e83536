"""How a call of the FLUX pipeline becomes an EditState."""

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image

from specedit.layout import TokenGrid
from specedit.models.flux import FluxKontext
from tests.models.flux.common import CALL


@pytest.mark.parametrize(
    ("height", "width", "area"),
    [(128, 128, 128 * 128), (None, None, 256 * 256), (512, 1024, 128 * 128), (100, 90, 9000), (144, 176, 144 * 176)],
)
def test_output_size_is_the_stock_pipelines(pipe, prepare, edit, height, width, area):
    stock = pipe(
        prompt="a", height=height, width=width, max_area=area, num_inference_steps=1, output_type="np",
        max_sequence_length=8,
    ).images  # fmt: skip
    _, _, state = prepare(height=height, width=width, max_area=area)
    assert (16 * state.grid.height, 16 * state.grid.width) == stock.shape[1:3]


def test_noise_and_reference_are_the_stock_pipelines(pipe, prepare, picture):
    _, _, state = prepare(height=144, width=176, max_area=144 * 176, image=picture(96, 128))
    noise = torch.randn(1, 4, 18, 22, generator=torch.Generator().manual_seed(0))
    assert torch.equal(state.noise, pipe._pack_latents(noise, 1, 4, 18, 22))
    pixels = torch.from_numpy(np.array(picture(96, 128))).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pipe._encode_vae_image(pixels, None)
    torch.testing.assert_close(state.reference, pipe._pack_latents(latents, 1, 4, 12, 16), rtol=1e-4, atol=1e-5)
    assert state.grid == TokenGrid(9, 11) and state.reference_grid == TokenGrid(6, 8)
    assert state.text_tokens == 8


def test_aligned_is_the_reference_at_its_own_positions(prepare, picture):
    small = picture(96, 128)
    _, _, state = prepare(height=144, width=112, max_area=144 * 112, image=small)
    aligned, reference = state.aligned.view(9, 7, 16), state.reference.view(6, 8, 16)
    assert torch.equal(aligned[:6], reference[:, :7]) and torch.equal(aligned[6:], aligned[5:6].expand(3, -1, -1))
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
    source = state.conditioning.source[0]
    assert source.shape == (3, 144, 112) and torch.equal(source[:, :96], pixels[..., :112])
    assert torch.equal(source[:, 96:], source[:, 95:96].expand(-1, 48, -1))
    assert torch.equal(prepare()[2].aligned, prepare()[2].reference)


@pytest.mark.parametrize("size", [(128, 128), (96, 128)], ids=["same grid", "other grid"])
def test_images_are_tiled_over_the_prompts(prepare, picture, size):
    pictures = [picture(*size, seed=seed) for seed in (1, 2)]
    _, _, state = prepare(image=pictures, prompt=["a", "b"], num_images_per_prompt=2)
    source = state.conditioning.source
    assert state.batch == 4 and state.reference.shape[0] == state.aligned.shape[0] == len(source) == 4
    for row in range(4):
        _, _, alone = prepare(image=pictures[row % 2])
        torch.testing.assert_close(state.reference[row], alone.reference[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.aligned[row], alone.aligned[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(state.conditioning.source[row], alone.conditioning.source[0])


def test_one_image_for_several_generators(prepare, picture):
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    _, _, state = prepare(image=picture(96, 128), num_images_per_prompt=2, generator=generators)
    assert state.batch == 2 and state.aligned.shape == (2, 64, 16)
    first = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    assert torch.equal(state.noise[0].T.reshape(4, 2, 2, 8, 8).permute(0, 3, 1, 4, 2).reshape(4, 16, 16), first[0])


@pytest.mark.parametrize("size", [(128, 128), (96, 128)], ids=["same grid", "other grid"])
def test_arrays_and_tensors_are_taken_as_pictures(prepare, picture, size):
    given = picture(*size)
    array = np.asarray(given).astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = prepare(image=given)[2]
    for image in (array, array[None], tensor, tensor[None], [array], [tensor], [given]):
        state = prepare(image=image)[2]
        torch.testing.assert_close(state.reference, expected.reference, rtol=1e-4, atol=1e-5)
        # PIL and torch resize a little differently
        difference = (state.conditioning.source - expected.conditioning.source).abs().max()
        assert difference < (1e-6 if size == (128, 128) else 0.1)


def test_source_values_are_the_callers_own(prepare):
    values = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prepare(image=values)[2].conditioning.source, values)


def test_latents_as_image(prepare):
    latents = torch.randn(1, 4, 12, 16)
    adapter, pipe, state = prepare(image=latents)
    assert torch.equal(state.reference, pipe._pack_latents(latents, 1, 4, 12, 16))
    assert state.reference_grid == TokenGrid(6, 8)
    assert torch.equal(state.aligned.view(8, 8, 16)[:6], state.reference.view(6, 8, 16))
    assert state.conditioning.source is None
    same = torch.randn(1, 4, 16, 16)
    assert torch.equal(prepare(image=same)[2].aligned, pipe._pack_latents(same, 1, 4, 16, 16))


def test_preferred_resolutions(prepare, picture, monkeypatch):
    monkeypatch.setattr("specedit.models.flux.PREFERRED_KONTEXT_RESOLUTIONS", [(96, 160), (128, 128), (192, 96)])
    for size, grid in (((100, 210), (6, 12)), ((130, 120), (8, 8)), ((200, 120), (10, 6))):
        assert prepare(image=picture(*size), _auto_resize=True)[2].reference_grid.shape == grid


def test_refusals(pipe):
    adapter = FluxKontext()
    call = CALL | {"image": Image.new("RGB", (128, 128))}
    assert adapter.refusal(pipe, call, "auto") is None
    assert "no image" in adapter.refusal(pipe, CALL, "auto")
    assert "sigmas" in adapter.refusal(pipe, call | {"sigmas": [1.0, 0.5]}, "auto")
    for name in (n for n in CALL if "ip_adapter" in n):
        assert name in adapter.refusal(pipe, call | {name: object()}, "auto")
    processor = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32)
    pipe.transformer.transformer_blocks[0].attn.set_processor(processor)
    assert "IP-Adapter is loaded" in adapter.refusal(pipe, call, "auto")
    pipe.transformer = torch.nn.Linear(1, 1)  # such as a quantised engine with kernels of its own
    assert adapter.refusal(pipe, call, "auto") == "the attention of Linear takes no processors of ours"


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (Image.new("RGBA", (128, 128)), ValueError, "expected an RGB picture, got mode 'RGBA'"),
        (Image.new("L", (128, 128)), ValueError, "expected an RGB picture, got mode 'L'"),
        (Image.new("RGB", (15, 200)), ValueError, "expected at least 16 px a side, got 15 x 200"),
        (np.zeros((128, 9, 3)), ValueError, "expected at least 16 px a side, got 9 x 128"),
        (torch.zeros(3, 0, 128), ValueError, "expected at least 1 px a side, got 128 x 0"),
        (np.zeros((128, 128)), ValueError, r"expected \(H, W, 3\).*got \(128, 128\)"),
        (np.zeros((128, 128, 1)), ValueError, r"expected \(H, W, 3\).*got \(128, 128, 1\)"),
        (np.zeros((3, 128, 128)), ValueError, r"expected \(H, W, 3\).*got \(3, 128, 128\)"),
        (torch.zeros(1, 128, 128), ValueError, r"expected \(3, H, W\).*got \(1, 128, 128\)"),
        (torch.zeros(7), ValueError, r"expected \(3, H, W\).*got \(7,\)"),
        (np.zeros((128, 128, 3), dtype=np.uint8), TypeError, "expected floating point values in 0..1, got uint8"),
        ("photo.png", TypeError, "expected a PIL image, array or tensor, got str"),
        ([Image.new("RGB", (128, 128)), None], TypeError, "expected a PIL image, array or tensor, got NoneType"),
        ([], ValueError, "expected at least one picture, got an empty list"),
    ],
)
def test_bad_images(prepare, image, error, message):
    with pytest.raises(error, match=f"image: {message}"):
        prepare(image=image)
