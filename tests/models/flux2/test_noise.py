"""Where FLUX.2's tokens are averaged and expanded: as the transformer takes them, normalised per packed channel.

A packed channel (c, a, b) of the transformer's tokens is z = (y - m) / d, y the autoencoder's latent pixel (a, b) of a
patch. m and d differ among the four pixels. The flow x = (1 - s) z + s e has white noise e. With the four pixels of a
block in z, the orthonormal Haar basis keeps the noise white, because H I H' = I. With those in y, the noise has the
covariance s^2 diag(d^2), and H diag(d^2) H' has terms beside its diagonal: the expansion adds detail noise that
should depend on the coarse token's own noise, and divided by d again the children's noise is not white.

The clean means agree with that choice. Over pictures, z has mean 0 in every channel, and so has a mean of z, as a
small picture's tokens have. A mean of y has the mean of the four m, which is (mean(m) - m_ab) / d_ab in channel (a, b):
a pattern that no picture's tokens have on average.
"""

import pytest
import torch

from specedit.geometry import PACKED
from specedit.layout import MixedLayout, TokenGrid, mean_pixels
from specedit.method.expand import cell_detail, expanded_sigma, haar, refine_layout

SIGMA = 0.7
GRID = TokenGrid(2, 2)
HAAR = torch.stack([torch.cat([c[None], d]) for c, d in (haar(row) for row in torch.eye(4, dtype=torch.float64))], 1)
# Of one latent channel: mean and deviation of its four pixels in a patch.
MEAN = torch.tensor([0.3, -0.2, 0.1, -0.4], dtype=torch.float64)
DEVIATION = torch.tensor([1.0, 1.4, 0.7, 1.2], dtype=torch.float64)


def linear(function, count):
    """The matrix of a linear function of a vector."""
    zero = function(torch.zeros(count, dtype=torch.float64))
    return torch.stack([function(row) - zero for row in torch.eye(count, dtype=torch.float64)], 1)


def expand(coarse, noise):
    """A coarse cell's one token (4,) and 12 detail coefficients of noise as its four children's pixels (16,)."""
    old, new = MixedLayout.all_coarse(GRID), MixedLayout.all_fine(GRID)
    split = noise.view(1, 1, 4, 1, 3)
    tokens, _ = refine_layout(
        coarse.view(1, 1, 4), old, new, SIGMA, split_noise=split,
        fresh_noise=torch.zeros(1, 4, 4, dtype=torch.float64), backend="torch",
    )  # fmt: skip
    return tokens.flatten()


def test_haar_keeps_equal_variances_white_and_no_others():
    torch.testing.assert_close(HAAR @ HAAR.T, torch.eye(4, dtype=torch.float64))
    mixed = HAAR @ torch.diag(DEVIATION**2) @ HAAR.T
    assert (mixed - torch.diag(mixed.diagonal())).abs().max() > 0.2


def test_noise_of_an_expansion_is_white_in_normalised_space():
    """Covariance in float64, exactly: the coarse token's noise has the level s, the details' the level 1."""
    matrix = linear(lambda x: expand(x[:4], x[4:]), 16)
    level = torch.cat([torch.full((4,), SIGMA), torch.ones(12)]).double() ** 2
    covariance = matrix @ torch.diag(level) @ matrix.T
    after = expanded_sigma(SIGMA)
    torch.testing.assert_close(covariance, after**2 * torch.eye(16, dtype=torch.float64))


def test_noise_of_an_expansion_in_the_autoencoders_space_is_not():
    """The same expansion of y: the coarse token's noise deviates by s d there, and children are divided by d after."""
    matrix = linear(lambda x: expand(x[:4], x[4:]), 16) / DEVIATION.repeat(4)[:, None]
    level = torch.cat([SIGMA * DEVIATION, torch.ones(12) * DEVIATION.mean()]).double() ** 2
    covariance = matrix @ torch.diag(level) @ matrix.T / expanded_sigma(SIGMA) ** 2
    assert (covariance.diagonal() - 1).abs().max() > 0.3
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() > 0.1


def test_signal_of_an_expansion_is_the_mean_and_its_detail():
    """With the reference's detail, the clean part of every child is (1 - s') z."""
    z = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    old, new = MixedLayout.all_coarse(GRID), MixedLayout.all_fine(GRID)
    zero = torch.zeros(1, 1, 4, 1, 3, dtype=torch.float64)
    tokens, after = refine_layout(
        (1 - SIGMA) * mean_pixels(z, GRID), old, new, SIGMA, split_noise=zero, known_detail=cell_detail(z, GRID),
        fresh_noise=torch.zeros_like(z), backend="torch",
    )  # fmt: skip
    torch.testing.assert_close(tokens, (1 - after) * z)


def test_normalised_means_have_the_mean_that_a_small_pictures_tokens_have():
    z = torch.randn(2000, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = z - z.mean(0)  # of all pictures: every packed channel of a token has mean 0
    ours = mean_pixels(z, GRID).mean(0)
    assert ours.abs().max() < 1e-12
    theirs = ((mean_pixels(z * DEVIATION + MEAN, GRID) - MEAN) / DEVIATION).mean(0)
    torch.testing.assert_close(theirs[0], (MEAN.mean() - MEAN) / DEVIATION)
    assert theirs.abs().max() > 0.3


def test_tokens_are_the_pipelines_normalised_latents(family_of, picture):
    """In diffusers' order, channel slowest; `_latents` undoes the batch norm and nothing else does."""
    family = family_of()
    pipe = family.make()
    adapter, state = family.prepare(pipe, (144, 112))
    with torch.no_grad():
        taken = pipe.image_processor.preprocess(picture(144, 112), height=144, width=112)
        latents = pipe.vae.encode(taken).latent_dist.mode()
        own = adapter._latents(pipe, state.reference, state.grid)
    torch.testing.assert_close(own, latents, rtol=1e-4, atol=1e-5)
    image = PACKED.to_image(state.reference, state.grid.shape)
    mean, var = pipe.vae.bn.running_mean, pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps
    mean, std = (x.view(4, 2, 2).repeat(1, *state.grid.shape) for x in (mean, var.sqrt()))
    torch.testing.assert_close(image[0] * std + mean, latents[0], rtol=1e-4, atol=1e-5)
    assert pytest.approx(mean.std().item(), abs=0.2) == 0.3  # the fixture's statistics do differ
