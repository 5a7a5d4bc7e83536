"""Causal convolutions of a single frame, as those of a picture."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from hypothesis import given, settings
from hypothesis import strategies as st

from specedit.models.shared.single_frame_vae import SingleFrameConv, _turn, single_frame
from tests.models.qwen.common import Taps


@pytest.fixture
def vae():
    """With every weight at work, those of frames that never come too."""
    torch.manual_seed(0)
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval().requires_grad_(False)  # fmt: skip


@pytest.fixture
def frames():
    return torch.rand(2, 3, 1, 72, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1


def round_trip(vae, frames):
    moments = vae.encode(frames).latent_dist.parameters
    return moments, vae.decode(moments[:, : moments.shape[1] // 2]).sample


@settings(deadline=None, max_examples=40)
@given(
    taps=st.integers(1, 4), side=st.integers(1, 3), stride=st.integers(1, 2), groups=st.sampled_from([1, 2]),
    batch=st.integers(1, 2), height=st.integers(3, 9), width=st.integers(3, 9), bias=st.booleans(),
    frames=st.integers(1, 3),
)  # fmt: skip
def test_a_causal_convolution_is_what_it_was(taps, side, stride, groups, batch, height, width, bias, frames):
    generator = torch.Generator().manual_seed(taps * 100 + side)
    conv = torch.nn.Conv3d(4, 6, (taps, side, side), (1, stride, stride), groups=groups, bias=bias)
    conv.requires_grad_(False)
    x = torch.randn(batch, height, width, frames, 4, generator=generator).permute(0, 4, 3, 1, 2)  # not contiguous
    border = [side // 2] * 4 + [taps - 1, 0]
    exact = copy.deepcopy(conv).double()(F.pad(x.double(), border))
    stock = conv(F.pad(x, border))
    with SingleFrameConv():
        ours = conv(F.pad(x, border))
    assert ours.shape == stock.shape == (batch, 6, frames, *stock.shape[3:])
    if frames > 1:
        assert torch.equal(ours, stock)
    else:
        assert (ours - exact).abs().max() <= max(2 * (stock - exact).abs().max(), 2e-6)


def test_the_autoencoder_is_as_near_to_float64_as_it_was(vae, frames):
    exact = round_trip(copy.deepcopy(vae).double(), frames.double())
    stock = round_trip(vae, frames)
    with single_frame(vae), Taps() as taps:
        ours = round_trip(vae, frames)
    assert taps.seen == []
    for a, b, c in zip(ours, stock, exact, strict=True):
        assert (a - c).abs().max() <= 2 * (b - c).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["enable_tiling", "enable_slicing"])
def test_tiles_and_slices(vae, frames, switch):
    vae.enable_tiling(32, 32, 24, 24) if switch == "enable_tiling" else vae.enable_slicing()
    stock = round_trip(vae, frames)
    with single_frame(vae), Taps() as taps:
        ours = round_trip(vae, frames)
    assert taps.seen == []
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_several_frames_are_a_video(vae, frames):
    video = torch.cat([frames, frames.flip(3), frames.flip(4), -frames, frames / 2], 2)
    stock = round_trip(vae, video)
    with single_frame(vae):
        ours = round_trip(vae, video)
    assert stock[1].shape[2] == 5
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_other_paddings_are_as_they_were():
    x = torch.arange(24.0).view(1, 1, 1, 4, 6)
    more = torch.cat([x, -x], 2)
    for one, border, options in (
        (x, (1, 1, 0, 0, 1, 1), {}),
        (x, (0, 0, 0, 0, 2, 0), dict(value=1.0)),
        (x, (0, 0, 0, 0, 2, 0), dict(mode="replicate")),
        (more, (0, 0, 0, 0, 2, 0), {}),
        (x[0], (1, 1, 2, 0), {}),
    ):
        with SingleFrameConv():
            ours = F.pad(one, border, **options)
        assert torch.equal(ours, F.pad(one, border, **options))


def test_other_convolutions_are_as_they_were(frames):
    weight = torch.randn(5, 3, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    for x, options in (
        (frames, dict(padding=1)),
        (frames, dict(padding="same")),
        (frames, dict(padding=(2, 1, 1), stride=2)),
        (frames[0].expand(3, 3, 72, 40), {}),
        (frames[0, :, :, :1].expand(3, 3, 1, 40), dict(padding=(0, 1, 1))),  # no batch, and one row
    ):
        stock = F.conv3d(x, weight, **options)
        with SingleFrameConv():
            ours = F.conv3d(x, weight, **options)
        assert torch.equal(ours, stock)


def test_a_weight_that_cannot_be_cut_meets_its_zeros(frames):
    class Whole(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.__getitem__:
                raise NotImplementedError("a quantised weight")
            return super().__torch_function__(func, types, args, kwargs or {})

    weight = torch.randn(5, 3, 3, 3, 3, generator=torch.Generator().manual_seed(0)).as_subclass(Whole)
    with SingleFrameConv():
        ours = F.conv3d(F.pad(frames, (1, 1, 1, 1, 2, 0)), weight)
    stock = F.conv3d(F.pad(frames, (1, 1, 1, 1, 2, 0)), weight)
    assert torch.equal(ours.as_subclass(torch.Tensor), stock.as_subclass(torch.Tensor))


def test_hooks_of_every_convolution_run(vae, frames):
    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Count.calls += 1
            return args, kwargs

    plain = round_trip(vae, frames)[1]
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            add_hook_to_module(module, Count())
    stock = round_trip(vae, frames)[1]
    stock_calls, Count.calls = Count.calls, 0
    with single_frame(vae), Taps() as taps:
        ours = round_trip(vae, frames)[1]
    assert torch.equal(stock, plain) and Count.calls == stock_calls > 10 and taps.seen == []
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_other_threads_notice_nothing():
    failures = []

    def elsewhere():
        try:
            F.conv3d(torch.ones(1, 1, 1, 3, 3), torch.ones(1, 1, 3, 3, 3))
        except RuntimeError as error:  # three taps for one frame: what stock says of it
            failures.append(error)

    with SingleFrameConv():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert F.conv3d(torch.ones(1, 1, 1, 3, 3), torch.ones(1, 1, 3, 3, 3), None, 1, 0).item() == 9
    assert len(failures) == 1


def test_gradients_are_those_of_stock(vae, frames):
    conv = vae.encoder.conv_in.requires_grad_(True)
    stock = torch.autograd.grad(conv(frames).square().sum(), conv.weight)[0]
    with SingleFrameConv():
        ours = torch.autograd.grad(conv(frames).square().sum(), conv.weight)[0]
    assert ours.shape == stock.shape and not ours[:, :, :-1].any()
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_compiled_and_other_autoencoders_are_left_alone(vae):
    def taps(vae):
        with single_frame(vae), Taps() as taps:
            torch.nn.Conv3d(1, 1, (3, 1, 1))(F.pad(torch.ones(1, 1, 1, 1, 1), (0, 0, 0, 0, 2, 0)))
        return taps.seen

    assert taps(vae) == []
    part, method = copy.deepcopy(vae), copy.deepcopy(vae)
    part.decoder.compile(backend="eager")
    method.decode = torch.compile(method.decode, backend="eager")
    whole = torch.compile(copy.deepcopy(vae), backend="eager")
    inside = copy.deepcopy(vae)
    inside.decoder = torch.compile(inside.decoder, backend="eager")
    two_dimensional = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    for other in (part, method, whole, inside, two_dimensional):
        assert taps(other) == [3]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copied_autoencoder_takes_separate_turns(duplicate):
    vae = torch.nn.Conv2d(1, 1, 1)
    with single_frame(vae), ThreadPoolExecutor(1) as other:
        again = duplicate(vae)
        assert other.submit(_turn(again)._lock.acquire, blocking=False).result()
        assert not other.submit(_turn(vae)._lock.acquire, blocking=False).result()
