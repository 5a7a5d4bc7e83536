"""Judges textures of the embedded editors by fresh renders, which are drawn once per material and size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from torch import Tensor

from ..evaluation import textures
from ..evaluation.texture_inputs import as_picture, as_region
from ..evaluation.texture_seam import profile
from ..evaluation.texture_statistics import describe, has_room
from .scenes import Case, fresh
from .textures import texture
from .vocabulary import MATERIALS

REFERENCE_SEED = 2**32  # scenes draw their textures from seeds below 2^31
RENDERS = 12  # in each of the two sets of a task's own material
OTHERS = 6  # the same of other materials and of whole right answers, which need be known less well


class Judge:
    """Texture distance, material and seam of edits of kind "texture".

    What they are compared with is drawn when it is first needed, and kept: renders by material and size, their
    statistics by material and region.
    """

    def __init__(self, through: textures.Through | None = None):
        """`through`: the editor's encoding and decoding for the fresh renders, see `textures.texture_distance`."""
        self.through = through
        self._renders: dict[tuple, Tensor] = {}
        self._references: dict[tuple, textures.Reference] = {}

    def score(self, image: Image.Image, case: Case) -> dict[str, Any]:
        """`texture_distance`, its parts as `texture_NAME`, `seam`, and `material`: whether it is the one asked for.

        Only the first, `material` and `seam`, all nan, if the region is too small for statistics.

        Raises:
            ValueError: a task of another kind, or an image of another size than the task's.
        """
        if case.region is None or case.material is None:
            raise ValueError(f"case: expected the kind texture, got {case.kind}")
        picture = as_picture("image", image)
        region = as_region(case.region, picture)
        if not has_room(region):
            return dict(texture_distance=math.nan, material=math.nan, seam=math.nan)
        found = describe(picture[None], region)
        parts = self._material(case.material, region, RENDERS).distance(found)
        known = {name: self._material(name, region, OTHERS) for name in MATERIALS}
        return dict(
            texture_distance=parts.pop("distance"),
            material=textures.nearest(found, known) == case.material,
            seam=self._seam(picture, region, case),
            **{f"texture_{name}": value for name, value in parts.items()},
        )

    def _material(self, name: str, region: Tensor, count: int) -> textures.Reference:
        def draw() -> textures.Reference:
            a, b = (describe(self._rendered(name, *region.shape, k, count), region) for k in (0, 1))
            return textures.Reference.of(a, b)

        return self._kept((name, count, *region.shape, region.numpy().tobytes()), draw)

    def _seam(self, picture: Tensor, region: Tensor, case: Case) -> float:
        if bool(region.all()):
            return math.nan

        def draw() -> textures.Reference:
            answers = [fresh(case, REFERENCE_SEED + i).target for i in range(2 * OTHERS)]
            pictures = torch.stack([as_picture("target", answer) for answer in answers])
            return textures.seam_reference(picture, region, pictures[:OTHERS], pictures[OTHERS:], self.through)

        known = self._kept(("seam", case.seed, *region.shape), draw)
        return known.distance({"seam": profile(picture[None], region)})["distance"]

    def _kept(self, key: tuple, draw: Callable[[], textures.Reference]) -> textures.Reference:
        if key not in self._references:
            self._references[key] = draw()
        return self._references[key]

    def _rendered(self, name: str, height: int, width: int, which: int, count: int) -> Tensor:
        """The first renders of set 0 or 1, after `through`, (count, 3, h, w) float32."""
        key = name, height, width, which
        held = self._renders.get(key, torch.empty(0, 3, height, width, dtype=torch.uint8))
        if len(held) < count:
            seeds = [REFERENCE_SEED + which * RENDERS + i for i in range(len(held), count)]
            drawn = torch.stack([texture(name, seed, height, width) for seed in seeds])
            held = torch.cat([held, (textures.passed(drawn, self.through) * 255).round().to(torch.uint8)])
            self._renders[key] = held
        return held[:count].float() / 255


_JUDGES: WeakKeyDictionary[torch.nn.Module, Judge] = WeakKeyDictionary()


def judge_of(pipe: Any) -> Judge:
    """The judge of an editor's tables: its references went through the pipeline's own autoencoder.

    One per autoencoder, whose weights must not change afterwards.
    """
    if pipe.vae not in _JUDGES:
        _JUDGES[pipe.vae] = Judge(autoencoding(pipe.vae))
    return _JUDGES[pipe.vae]


def autoencoding(vae: torch.nn.Module) -> textures.Through:
    """Encoding and decoding of pictures (n, 3, h, w) in 0..1 as the editors' pipelines do."""
    held = ref(vae)  # so that a judge does not keep its autoencoder alive
    video = isinstance(vae, AutoencoderKLQwenImage)

    @torch.no_grad()
    def through(pictures: Tensor) -> Tensor:
        vae = held()
        given = (2 * pictures - 1).to(vae.device, vae.dtype)
        given = given.unsqueeze(2) if video else given
        out = vae.decode(vae.encode(given).latent_dist.mode()).sample
        out = out.squeeze(2) if video else out
        return (out.float().cpu() / 2 + 0.5).clamp(0, 1)

    return through
