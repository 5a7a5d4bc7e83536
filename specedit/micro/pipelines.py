"""The embedded Qwen editor's pipeline: diffusers' own, at the picture's own size.

`QwenImageEditPipeline.__call__` resizes every picture to one megapixel with `calculate_dimensions(1024 * 1024, ratio)`,
and has no argument for it. The processor's `max_pixels` limits the vision-language encoder, but not the autoencoder's
reference, whose 4,096 tokens would dwarf the 1,024 of a 512 px edit. So this class runs the stock method's code with
another `calculate_dimensions`. Nothing in diffusers is changed.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from diffusers import QwenImageEditPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast, Qwen2VLProcessor

try:
    from transformers import Qwen2VLImageProcessorPil as Qwen2VLImageProcessor
except ImportError:  # before transformers 5, this class needed no torchvision
    from transformers import Qwen2VLImageProcessor

from .words import warn_unless_understood

LARGEST = 1024 * 1024  # px; larger pictures are resized to it, as in the stock pipeline
_STOCK = inspect.unwrap(QwenImageEditPipeline.__call__)


class OwnSizeQwenImageEditPipeline(QwenImageEditPipeline):
    """QwenImageEditPipeline that edits pictures of up to 1 MP at their own size, in whole tokens."""

    def picture_size(self, image: Image.Image) -> tuple[int, int]:
        """Width and height at which a picture is encoded; also the default size of the output."""
        width, height = image.size
        if width * height > LARGEST:
            return calculate_dimensions(LARGEST, width / height)[:2]
        token = 2 * self.vae_scale_factor
        if min(width, height) < token:
            raise ValueError(f"image: expected at least {token} px a side, got {width} x {height}")
        return width // token * token, height // token * token

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As diffusers saves pipelines; the index names the libraries' classes, which our two descend from."""
        super().save_pretrained(save_directory, *args, **kwargs)
        self.processor.save_pretrained(Path(save_directory) / "processor")
        index = Path(save_directory) / "model_index.json"
        written = json.loads(index.read_text(encoding="utf-8")) | {
            "_class_name": "QwenImageEditPipeline",
            "processor": ["transformers", "Qwen2VLProcessor"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        }
        index.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")

    @functools.wraps(QwenImageEditPipeline.encode_prompt)
    def encode_prompt(self, prompt: Any = None, *args: Any, **kwargs: Any) -> Any:
        warn_unless_understood(prompt or (), vars(self).setdefault("_warned_prompts", set()))
        return super().encode_prompt(prompt, *args, **kwargs)

    @torch.no_grad()
    @functools.wraps(_STOCK)
    def __call__(self, image: Any = None, *args: Any, **kwargs: Any) -> Any:
        first = image[0] if isinstance(image, list) and image else image
        if not isinstance(first, Image.Image):
            raise TypeError(f"image: expected a PIL image or a list of them, got {type(first).__name__}")
        size = (*self.picture_size(first), None)
        names = _STOCK.__globals__ | {"calculate_dimensions": lambda area, ratio: size}
        stock = FunctionType(_STOCK.__code__, names, _STOCK.__name__, _STOCK.__defaults__, _STOCK.__closure__)
        return stock(self, image, *args, **kwargs)


class PictureProcessor(Qwen2VLProcessor):
    """Qwen2VLProcessor without videos, which need torchvision."""

    def __init__(self, image_processor: Any, tokenizer: PreTrainedTokenizerFast):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.video_processor = self.chat_template = None
        self.image_token = "<|image_pad|>"

    def __call__(
        self, text: str | list[str], images: Any = None, padding: bool = True, return_tensors: str = "pt"
    ) -> BatchFeature:
        """`input_ids` and `attention_mask`; for pictures also `pixel_values` and `image_grid_thw`.

        Each `<|image_pad|>` is repeated for every token of its picture. Only "pt" tensors are supported.
        """
        vision = {} if images is None else self.encode_images(images if isinstance(images, list) else [images])
        return self.join([text] if isinstance(text, str) else text, vision, padding)

    def encode_images(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """`pixel_values` (all patches of all pictures) and `image_grid_thw` (n, 3)."""
        return dict(self.image_processor(images=images, return_tensors="pt"))

    def join(self, texts: list[str], vision: dict[str, torch.Tensor], padding: bool = True) -> BatchFeature:
        """Texts with the output of `encode_images` for their pictures; a single picture serves every text."""
        if vision:
            places = sum(text.count(self.image_token) for text in texts)
            if len(vision["image_grid_thw"]) == 1 < places:
                vision = {name: value.repeat(places, 1) for name, value in vision.items()}
            counts = iter((vision["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
            pad = re.escape(self.image_token)
            texts = [re.sub(pad, lambda _: self.image_token * next(counts), one) for one in texts]
        return BatchFeature({**self.tokenizer(texts, padding=padding, return_tensors="pt"), **vision})

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        self.image_processor.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> PictureProcessor:
        return cls(
            Qwen2VLImageProcessor.from_pretrained(folder, **kwargs),
            PreTrainedTokenizerFast.from_pretrained(folder, **kwargs),
        )
