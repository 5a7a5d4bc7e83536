"""The Qwen editor's pipeline: diffusers' own at another size, and a processor without videos."""

import inspect

import pytest
import torch
from diffusers import QwenImageEditPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as stock
from PIL import Image

import specedit
from specedit.micro import qwen, scenes
from specedit.micro.pipelines import OwnSizeQwenImageEditPipeline, PictureProcessor
from specedit.models.qwen.edit import QwenImageEdit
from specedit.testing import Family
from specedit.testing.conformance import CallConformance
from specedit.testing.stages import StageConformance

QUICK = dict(num_inference_steps=2, output_type="latent")


def edit(pipe, size=(128, 128), seed=0, **call):
    case = scenes.sample(3, size)
    call = dict(image=case.source, prompt=case.prompt, **QUICK) | call
    return pipe(**call, generator=torch.Generator().manual_seed(seed)).images


@pytest.fixture
def sizes(small_qwen, monkeypatch):
    """What the transformer is called with: (target, reference) of every call."""
    seen, forward = [], small_qwen.transformer.forward

    def watch(*args, **kwargs):
        seen.append([tuple(shape) for shape in kwargs["img_shapes"][0]])
        assert kwargs["hidden_states"].shape[1] == sum(f * h * w for f, h, w in seen[-1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(small_qwen.transformer, "forward", watch)
    return seen


@pytest.mark.parametrize(("size", "grid"), [((128, 128), (8, 8)), ((96, 160), (6, 10)), ((100, 130), (6, 8))])
def test_pictures_are_edited_at_their_own_size(small_qwen, sizes, size, grid):
    latents = edit(small_qwen, size)
    assert sizes == [[(1, *grid), (1, *grid)]] * 2
    assert latents.shape == (1, grid[0] * grid[1], 64)


@pytest.mark.slow
def test_stock_size_equals_the_stock_call(small_qwen, monkeypatch):
    """The stock pipeline, told the same size by the patch that this class exists to do without, gives the same."""
    own = edit(small_qwen, negative_prompt=" ", true_cfg_scale=2.0)
    plain = QwenImageEditPipeline(**small_qwen.components)
    plain.set_progress_bar_config(disable=True)
    monkeypatch.setattr(stock, "calculate_dimensions", lambda area, ratio: (128, 128, None))
    assert torch.equal(edit(plain, negative_prompt=" ", true_cfg_scale=2.0), own)


def test_diffusers_is_not_modified(small_qwen):
    before = stock.calculate_dimensions
    edit(small_qwen)
    assert stock.calculate_dimensions is before and before(1024 * 1024, 1.0)[:2] == (1024, 1024)
    assert inspect.signature(type(small_qwen).__call__) == inspect.signature(QwenImageEditPipeline.__call__)


def test_sizes_beyond_either_end(small_qwen):
    assert small_qwen.picture_size(Image.new("RGB", (4000, 2000))) == (1440, 736)
    assert small_qwen.picture_size(Image.new("RGB", (1024, 1024))) == (1024, 1024)
    with pytest.raises(ValueError, match="image: expected at least 16 px a side, got 200 x 15"):
        small_qwen.picture_size(Image.new("RGB", (200, 15)))


@pytest.mark.parametrize("image", [None, [], torch.zeros(1, 3, 64, 64)])
def test_non_pictures_are_one_line_errors(small_qwen, image):
    with pytest.raises(TypeError, match="image: expected a PIL image or a list of them, got"):
        small_qwen(image=image, prompt="make it red")


def test_installed_pipeline_keeps_the_pictures_size(small_qwen, sizes):
    specedit.install(small_qwen, steps=(0, 0, 2), attention="stock")
    edit(small_qwen, (96, 160))
    assert [(target[1], reference[1]) for target, reference in sizes] == [(60, 60)] * 2


# ------------------------------------------------------------------------------------------------------- processor


def test_vision_tokens_are_few_at_any_size(small_qwen):
    for size in ((64, 64), (128, 512), (512, 512), (1024, 1024)):
        texts = [small_qwen.prompt_template_encode.format("remove the red star")]
        inputs = small_qwen.processor(text=texts, images=Image.new("RGB", size), padding=True, return_tensors="pt")
        pad = small_qwen.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        vision = int((inputs["input_ids"] == pad).sum())
        assert 1 <= vision <= 4 and vision == int(inputs["image_grid_thw"].prod()) // 4


def test_one_picture_serves_a_batch_of_prompts_and_each_its_own(small_qwen):
    red, tall = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 128))
    texts = [small_qwen.prompt_template_encode.format(p) for p in ("remove the star", "make it greyscale")]
    shared = small_qwen.processor(text=texts, images=red)
    assert torch.equal(shared["image_grid_thw"][0], shared["image_grid_thw"][1])
    own = small_qwen.processor(text=texts, images=[red, tall])
    pad = small_qwen.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    counts = (own["input_ids"] == pad).sum(1)
    assert counts.tolist() == (own["image_grid_thw"].prod(1) // 4).tolist() and counts[0] != counts[1]
    assert "pixel_values" not in small_qwen.processor(text=texts)


def test_a_saved_processor_reads_back(small_qwen, tmp_path):
    small_qwen.processor.save_pretrained(tmp_path)
    again = PictureProcessor.from_pretrained(tmp_path)
    texts = [small_qwen.prompt_template_encode.format("paint the blue ring cyan")]
    picture = scenes.sample(1, 128).source
    first, second = (p(text=texts, images=picture) for p in (small_qwen.processor, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------- SpecEdit on it


@pytest.mark.thorough  # the adapter, its hooks, its stages and its switches are TestQwenImageEdit's
class TestOwnSize(CallConformance):
    """Every size here is the picture's own: nothing is patched as for the stock pipeline's tests."""

    test_a_stock_pipeline_on_the_same_transformer_stays_stock = test_offloading_changes_nothing = None
    check_batch = StageConformance.check_batch
    test_samples_of_a_batch_are_independent = StageConformance.test_samples_of_a_batch_are_independent

    @pytest.fixture
    def family(self, make_small_qwen, picture):
        def call(height, width):
            return dict(image=picture(height, width), prompt="make it red", height=height, width=width)

        return Family(
            QwenImageEdit, make_small_qwen, call, guided=dict(negative_prompt=" ", true_cfg_scale=2.0),
            batch=lambda n: dict(image=[picture(seed=i) for i in range(n)], prompt=["red", "make it large"][:n]),
            compiles_as="QwenImageEdit",
        )  # fmt: skip


def test_it_is_a_qwen_image_edit_pipeline(small_qwen):
    assert isinstance(small_qwen, QwenImageEditPipeline) and type(small_qwen) is OwnSizeQwenImageEditPipeline
    assert QwenImageEdit.matches(small_qwen)


@pytest.mark.slow
def test_a_saved_editor_is_read_again(small_qwen, tmp_path):
    """Installed or not, and by the class of diffusers as well, whose index it has."""
    specedit.install(small_qwen, "turbo").save_pretrained(tmp_path)
    specedit.uninstall(small_qwen)
    again = qwen.read(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is OwnSizeQwenImageEditPipeline
    torch.testing.assert_close(edit(again), edit(small_qwen), rtol=0, atol=1e-5)  # read weights lie elsewhere in memory
    assert QwenImageEditPipeline.load_config(tmp_path)["_class_name"] == "QwenImageEditPipeline"
