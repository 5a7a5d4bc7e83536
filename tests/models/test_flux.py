"""The FLUX adapter against the stock pipeline's own steps."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image

from specedit import SpecEditConfig
from specedit.grid import MixedLayout, TokenGrid
from specedit.models import attention
from specedit.models.base import rows_index
from specedit.models.flux import FluxKontext
from specedit.sampler import restrict
from tests.models.conformance import Ops

CALL = dict(
    image=None, prompt="make it red", prompt_2=None, negative_prompt=None, negative_prompt_2=None, true_cfg_scale=1.0,
    height=128, width=128, sigmas=None, guidance_scale=3.5, num_images_per_prompt=1, generator=None, latents=None,
    prompt_embeds=None, pooled_prompt_embeds=None, ip_adapter_image=None, ip_adapter_image_embeds=None,
    negative_ip_adapter_image=None, negative_ip_adapter_image_embeds=None, negative_prompt_embeds=None,
    negative_pooled_prompt_embeds=None, joint_attention_kwargs=None, callback_on_step_end_tensor_inputs=["latents"],
    max_sequence_length=8, max_area=128 * 128, _auto_resize=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def prepare(pipe, picture):
    """Prepares a call: (adapter, pipe, state)."""

    def call(attention="auto", **changes):
        adapter = FluxKontext()
        adapter.attach(pipe)
        arguments = CALL | {"image": picture(), "generator": torch.Generator().manual_seed(0)} | changes
        return adapter, pipe, adapter.prepare(pipe, arguments, attention)

    return call


def mixed_layout(grid, share=0.4):
    return MixedLayout(grid, torch.rand(grid.coarse().shape, generator=torch.Generator().manual_seed(0)) < share)


def random_like(layout, batch=1, seed=3):
    return torch.randn(batch, layout.tokens, 16, generator=torch.Generator().manual_seed(seed))


def velocity(prepared, layout, config, sigma=0.6, tokens=None, reference_layout=None):
    adapter, pipe, state = prepared
    reference_layout = reference_layout or layout.resized(state.reference_grid)
    reference = restrict(state.reference, reference_layout)
    tokens = random_like(layout, state.batch) if tokens is None else tokens
    rows = list(range(state.batch))
    return adapter.velocity(pipe, state, tokens, sigma, rows, layout, reference, reference_layout, config)


# ------------------------------------------------------------------------------------------------------- velocity


@pytest.mark.parametrize("attention", ["auto", "torch", "stock"])
@pytest.mark.parametrize("split", [True, False], ids=["fine", "coarse"])
def test_velocity_of_one_resolution_is_the_stock_call(prepare, attention, split):
    adapter, pipe, state = prepare(attention)
    layout = (MixedLayout.all_fine if split else MixedLayout.all_coarse)(state.grid)
    side = 8 if split else 4
    got = velocity((adapter, pipe, state), layout, SpecEditConfig(attention=attention))
    adapter.detach(pipe)
    embeds, pooled, text_ids = pipe.encode_prompt("make it red", None, max_sequence_length=8)
    ids = pipe._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    reference_ids = ids.clone()
    reference_ids[:, 0] = 1
    tokens = random_like(layout)
    reference = restrict(state.reference, layout)
    expected = pipe.transformer(
        hidden_states=torch.cat([tokens, reference], 1), timestep=torch.tensor([0.6]), guidance=torch.tensor([3.5]),
        pooled_projections=pooled, encoder_hidden_states=embeds, txt_ids=text_ids,
        img_ids=torch.cat([ids, reference_ids]), return_dict=False,
    )[0][:, : layout.tokens]  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key_bias", ["area", "none"])
@pytest.mark.parametrize("attention", ["torch", "stock", "auto"])
def test_permuting_tokens_with_their_positions_changes_nothing(prepare, attention, key_bias):
    check_permutation(prepare, SpecEditConfig(attention=attention, key_bias=key_bias))


def test_permuting_tokens_under_phase_aligned_rope(prepare):
    check_permutation(prepare, SpecEditConfig(rope="phase_aligned"))


def check_permutation(prepare, config):
    adapter, pipe, state = prepare(config.attention, height=144, width=112, max_area=144 * 112)
    layout = mixed_layout(state.grid, 0.1)
    reference_layout = layout.resized(state.reference_grid)
    reference, tokens = restrict(state.reference, reference_layout), random_like(layout)
    assert layout.is_mixed and reference_layout.is_mixed

    def shuffled(layout, seed):
        order = torch.randperm(layout.tokens, generator=torch.Generator().manual_seed(seed))
        moved = SimpleNamespace(positions=layout.positions[order], area=layout.area[order], is_mixed=True)
        return order, moved

    def call(tokens, layout, reference, reference_layout):
        return adapter.velocity(pipe, state, tokens, 0.5, [0], layout, reference, reference_layout, config)

    order, moved = shuffled(layout, 1)
    reference_order, reference_moved = shuffled(reference_layout, 2)
    expected = call(tokens, layout, reference, reference_layout)[:, order]
    got = call(tokens[:, order], moved, reference[:, reference_order], reference_moved)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    stayed = SimpleNamespace(positions=layout.positions, area=moved.area, is_mixed=True)
    wrong = call(tokens[:, order], stayed, reference[:, reference_order], reference_moved)
    assert (wrong - expected).abs().max() > 1e-3  # positions matter


@pytest.mark.parametrize("key_bias", ["area", "none"])
def test_attention_stock_and_torch_agree(prepare, key_bias):
    prepared = prepare("torch")
    layout = mixed_layout(prepared[2].grid)
    results = [
        velocity(prepared, layout, SpecEditConfig(attention=attention, key_bias=key_bias))
        for attention in ("torch", "stock", "auto")
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0], results[2])


def test_key_bias_and_rope_change_a_mixed_sequence_only(prepare):
    prepared = prepare()
    grid = prepared[2].grid
    configs = [SpecEditConfig(), SpecEditConfig(key_bias="none"), SpecEditConfig(rope="phase_aligned")]
    for layout, differ in ((mixed_layout(grid), True), (MixedLayout.all_fine(grid), False)):
        area, none, aligned = (velocity(prepared, layout, config) for config in configs)
        assert ((area - none).abs().max() > 1e-4) == differ
        assert ((area - aligned).abs().max() > 1e-4) == differ


def test_the_transformer_is_told_where_tokens_lie(prepare, monkeypatch):
    adapter, pipe, state = prepare(height=144, width=112, max_area=144 * 112)
    seen = {}
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda **kwargs: seen.update(kwargs) or forward(**kwargs))
    layout = mixed_layout(state.grid)
    reference_layout = layout.resized(state.reference_grid)
    velocity((adapter, pipe, state), layout, SpecEditConfig(), sigma=0.25)
    ids = seen["img_ids"]
    assert ids.dtype == torch.float32 and (ids % 1 == 0.5).any()
    assert torch.equal(ids[: layout.tokens, 1:], layout.positions) and (ids[: layout.tokens, 0] == 0).all()
    assert torch.equal(ids[layout.tokens :, 1:], reference_layout.positions) and (ids[layout.tokens :, 0] == 1).all()
    assert seen["timestep"].item() == pytest.approx(0.25)
    context = seen["joint_attention_kwargs"]["specedit"]
    area = torch.cat([torch.ones(8), layout.area, reference_layout.area])
    torch.testing.assert_close(context.key_bias.exp(), area)


def test_true_cfg(prepare):
    guided = prepare(negative_prompt="blue", true_cfg_scale=2.5)
    assert guided[2].branches == 2
    layout = mixed_layout(guided[2].grid)
    got = velocity(guided, layout, SpecEditConfig())
    positive = velocity(prepare(), layout, SpecEditConfig())
    negative = velocity(prepare(prompt="blue"), layout, SpecEditConfig())
    torch.testing.assert_close(got, negative + 2.5 * (positive - negative), rtol=1e-4, atol=1e-5)
    assert prepare(negative_prompt="blue", true_cfg_scale=1.0)[2].branches == 1
    assert prepare(true_cfg_scale=2.5)[2].branches == 1


def test_rows_pick_their_own_prompts(prepare):
    adapter, pipe, state = prepare(prompt=["make it red", "make it blue and large"])
    layout = MixedLayout.all_coarse(state.grid)
    tokens, reference = random_like(layout, 2), restrict(state.reference, layout)
    both = adapter.velocity(pipe, state, tokens, 0.5, [0, 1], layout, reference, layout, SpecEditConfig())
    for row in (0, 1):
        one = slice(row, row + 1)
        alone = adapter.velocity(pipe, state, tokens[one], 0.5, [row], layout, reference[one], layout, SpecEditConfig())
        torch.testing.assert_close(alone, both[one], rtol=1e-5, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-4


@pytest.mark.parametrize("rope", ["scaled", "phase_aligned"])
@pytest.mark.parametrize("rows", [[0, 1], [1], [0, 2]])
def test_what_a_stage_shares_is_made_by_its_first_step(prepare, monkeypatch, rope, rows):
    adapter, pipe, state = prepare("torch", prompt=["red", "blue and large", "no more than green"])
    layout = mixed_layout(state.grid)
    reference, tokens = restrict(state.reference, layout)[rows], random_like(layout, len(rows))
    config = SpecEditConfig(rope=rope, attention="torch")
    made = Counter()
    for name in ("half_table", "segments"):
        function = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, f=function, n=name: made.update([n]) or f(*a))
    pipe.transformer.pos_embed.register_forward_hook(lambda *a: made.update(["pos_embed"]))

    def step():
        return adapter.velocity(pipe, state, tokens, 0.5, rows, layout, reference, layout, config)

    first = step()
    tables = 1 if rope == "scaled" else 2
    # Segments of all queries, and of those that the last block computes.
    assert made == {"half_table": 2 * tables, "pos_embed": tables + 1} | ({"segments": 2} if tables == 2 else {})
    with Ops() as later:
        again = step()
    assert torch.equal(first, again)
    assert made["half_table"] == 2 * tables and made["pos_embed"] == tables + 2  # the transformer's own is left
    # Nothing that the host would have to wait for: no sizes that depend on masks, no values sent to the device.
    assert later.names["addmm"] and not later.names["nonzero"] and not later.names["lift_fresh"]
    state.extra.pop("sequences")
    assert torch.equal(step(), first) and made["half_table"] == 4 * tables


def test_stages_do_not_share_what_is_theirs(prepare):
    adapter, pipe, state = prepare()
    sparse, dense = mixed_layout(state.grid, 0.2), mixed_layout(state.grid, 0.6)
    config = SpecEditConfig()
    one, other = (velocity((adapter, pipe, state), layout, config) for layout in (sparse, dense))
    assert len(state.extra["sequences"]) == 2
    for layout, expected in ((sparse, one), (dense, other)):
        assert torch.equal(velocity((adapter, pipe, state), layout, config), expected)
        assert torch.equal(velocity(prepare(), layout, config), expected)  # another run, nothing made before


def test_a_prompt_that_a_callback_changes_is_seen_at_once(prepare):
    prepared = prepare()
    layout = mixed_layout(prepared[2].grid)
    before = velocity(prepared, layout, SpecEditConfig())
    prepared[2].extra["positive"]["encoder_hidden_states"].mul_(2)
    assert not torch.equal(velocity(prepared, layout, SpecEditConfig()), before)


@pytest.mark.parametrize("rows", [[0], [3], [0, 1, 2], [2, 3], [0, 2], [2, 1], [3, 3]])
def test_rows_index_picks_as_a_list_does(rows):
    x = torch.arange(8).view(4, 2)
    index = rows_index(rows, "cpu")
    assert torch.equal(x[index], x[rows])
    assert isinstance(index, slice) == (rows in ([0], [3], [0, 1, 2], [2, 3]))


# -------------------------------------------------------------------------------------------------------- prepare


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


def test_aligned_is_the_reference_on_the_outputs_grid(pipe, prepare, picture):
    small = picture(96, 128)
    _, _, state = prepare(height=144, width=176, max_area=144 * 176, image=small)
    large = small.resize((176, 144), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(large)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pipe._encode_vae_image(pixels, None)
    torch.testing.assert_close(state.aligned, pipe._pack_latents(latents, 1, 4, 18, 22), rtol=1e-4, atol=1e-5)
    assert torch.equal(state.extra["source"][0], torch.from_numpy(np.array(large)).permute(2, 0, 1) / 255)
    assert torch.equal(prepare()[2].aligned, prepare()[2].reference)


@pytest.mark.parametrize("size", [(128, 128), (96, 128)], ids=["same grid", "other grid"])
def test_images_are_tiled_over_the_prompts(prepare, picture, size):
    pictures = [picture(*size, seed=seed) for seed in (1, 2)]
    _, _, state = prepare(image=pictures, prompt=["a", "b"], num_images_per_prompt=2)
    assert state.batch == 4 and state.reference.shape[0] == state.aligned.shape[0] == len(state.extra["source"]) == 4
    for row in range(4):
        _, _, alone = prepare(image=pictures[row % 2])
        torch.testing.assert_close(state.reference[row], alone.reference[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.aligned[row], alone.aligned[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(state.extra["source"][row], alone.extra["source"][0])


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
        assert (state.extra["source"] - expected.extra["source"]).abs().max() < (1e-6 if size == (128, 128) else 0.1)


def test_source_values_are_the_callers_own(prepare):
    values = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prepare(image=values)[2].extra["source"], values)


def test_latents_as_image(prepare):
    latents = torch.randn(1, 4, 12, 16)
    adapter, pipe, state = prepare(image=latents)
    assert torch.equal(state.reference, pipe._pack_latents(latents, 1, 4, 12, 16))
    assert state.reference_grid == TokenGrid(6, 8) and state.aligned.shape == state.noise.shape
    assert state.extra.get("source") is None
    same = torch.randn(1, 4, 16, 16)
    assert torch.equal(prepare(image=same)[2].aligned, pipe._pack_latents(same, 1, 4, 16, 16))


def test_preferred_resolutions(prepare, picture, monkeypatch):
    monkeypatch.setattr("specedit.models.flux.PREFERRED_KONTEXT_RESOLUTIONS", [(96, 160), (128, 128), (192, 96)])
    for size, grid in (((100, 210), (6, 12)), ((130, 120), (8, 8)), ((200, 120), (10, 6))):
        assert prepare(image=picture(*size), _auto_resize=True)[2].reference_grid.shape == grid


def test_refusals(pipe):
    adapter = FluxKontext()
    call = CALL | {"image": object()}
    assert adapter.refusal(pipe, call) is None
    assert "no image" in adapter.refusal(pipe, CALL)
    assert "sigmas" in adapter.refusal(pipe, call | {"sigmas": [1.0, 0.5]})
    for name in (n for n in CALL if "ip_adapter" in n):
        assert name in adapter.refusal(pipe, call | {name: object()})
    processor = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32)
    pipe.transformer.transformer_blocks[0].attn.set_processor(processor)
    assert "IP-Adapter is loaded" in adapter.refusal(pipe, call)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (Image.new("RGBA", (128, 128)), ValueError, "expected an RGB picture, got mode 'RGBA'"),
        (Image.new("L", (128, 128)), ValueError, "expected an RGB picture, got mode 'L'"),
        (Image.new("RGB", (63, 200)), ValueError, "expected at least 64 px a side, got 63 x 200"),
        (np.zeros((128, 40, 3)), ValueError, "expected at least 64 px a side, got 40 x 128"),
        (torch.zeros(3, 40, 128), ValueError, "expected at least 64 px a side, got 128 x 40"),
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


# --------------------------------------------------------------------------------------------- features and decode


def test_features_are_what_the_decoder_computes(prepare):
    adapter, pipe, state = prepare(height=144, width=112, max_area=144 * 112)
    tokens = random_like(MixedLayout.all_fine(state.grid))
    decoder, seen, handles = pipe.vae.decoder, [], []
    for module in (decoder.conv_in, decoder.mid_block, decoder.up_blocks[0]):
        handles.append(module.register_forward_hook(lambda module, inputs, output: seen.append(output)))
    adapter.decode(pipe, state, tokens, "pt")
    expected = list(seen)
    got = adapter.features(pipe, tokens, state.grid)
    for handle in handles:
        handle.remove()
    assert len(got) == len(expected) == 3
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_decode_is_the_stock_pipelines(prepare):
    adapter, pipe, state = prepare(height=144, width=112, max_area=144 * 112)
    tokens = random_like(MixedLayout.all_fine(state.grid))
    assert adapter.decode(pipe, state, tokens, "latent") is tokens
    latents = pipe._unpack_latents(tokens, 144, 112, 8) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    expected = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(adapter.decode(pipe, state, tokens, "pt"), expected)
    image = adapter.decode(pipe, state, tokens, "pil")[0]
    assert image.size == (112, 144)
    rounded = (adapter.decode(pipe, state, tokens, "np")[0] * 255).round().astype(np.uint8)
    assert np.array_equal(np.asarray(image), rounded)
