"""What the tests of the editing pipeline share: a tiny FLUX-Kontext pipeline made in memory, and one call of it.

The heavy imports stay inside the fixtures: the kernel tests below this folder need none of them.
"""

import gc
import io
import json
import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Dynamo's cache of fake tensors hardly ever hits where sizes are symbols, and takes a good part of a trace.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

from tests.copies import Copies, copies_of

# pytest listens to loggers that do not propagate, and torch would write a trace of all that it compiles.
logging.getLogger("torch.__trace").propagate = True

pytest_plugins = [
    f"tests.{name}"
    for name in ("cpu_times", "shallow", "shares", "tiny_flux2", "tiny_qwen", "tiny_qwen21", "warm_python")
]

# The same examples on every run; machines that are busy need no deadline.
hypothesis.settings.register_profile("specedit", derandomize=True, deadline=None)
hypothesis.settings.load_profile("specedit")


@pytest.fixture(scope="session")
def tiny_components():
    """The parts of a FluxKontextPipeline: random weights, 4 latent channels, 16 px a token, byte tokenizers."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    def seeded(make):
        torch.manual_seed(0)
        return make().eval()

    four = (4, 4, 4, 4)
    transformer = seeded(
        lambda: FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )
    )  # fmt: skip
    with torch.no_grad():  # as initialised its blocks hardly matter; larger weights make every mistake visible
        for parameter in transformer.parameters():
            parameter.mul_(1.5)
    return dict(
        transformer=transformer,
        vae=seeded(
            lambda: AutoencoderKL(
                sample_size=32, block_out_channels=four, down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=1,
                use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035,
            )
        ),
        text_encoder=seeded(
            lambda: CLIPTextModel(
                CLIPTextConfig(
                    bos_token_id=0, eos_token_id=2, pad_token_id=1, hidden_size=32, intermediate_size=37,
                    num_attention_heads=4, num_hidden_layers=1, vocab_size=300, projection_dim=32,
                )
            )
        ),
        text_encoder_2=seeded(
            lambda: T5EncoderModel(
                T5Config(
                    vocab_size=300, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, is_encoder_decoder=False
                )
            )
        ),
        tokenizer=byte_tokenizer(["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>", 77),
        tokenizer_2=byte_tokenizer(["<pad>", "</s>", "<unk>"], "$A </s>", 512),
    )  # fmt: skip


def byte_tokenizer(specials, template, length):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    used = [(word, i) for i, word in enumerate(specials) if word in template.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    names = {"<s>": "bos_token", "<pad>": "pad_token", "</s>": "eos_token", "<unk>": "unk_token"}
    special = {names[word]: word for word in specials}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **special)


@pytest.fixture(scope="session")
def make_pipe(tiny_components):
    """Makes pipelines with equal weights and nothing in common that an installation changes."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

    # Tokenizers are copied too: two threads must not share one.
    own = {name: Copies(tiny_components[name]) for name in ("transformer", "tokenizer", "tokenizer_2")}

    def make(cls=FluxKontextPipeline, scheduler=None):
        parts = tiny_components | {name: copies() for name, copies in own.items()}
        scheduler = scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        pipe = cls(scheduler=scheduler, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(autouse=True)
def one_thread(request):
    """Tiny tensors gain nothing from threads, and lose much where the machine is busy."""
    if "make_pipe" not in request.fixturenames:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pipe(make_pipe):
    return make_pipe()


def make_picture(height=128, width=128, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def picture():
    """Makes smooth random RGB pictures."""
    return make_picture


@pytest.fixture(scope="session")
def edit():
    """Calls a pipeline and returns its images: by default the latents of one 128 x 128 px edit with seed 0."""

    def call(pipe, size=(128, 128), seed=0, **arguments):
        height, width = size
        defaults = dict(
            image=make_picture(height, width), prompt="make it red", height=height, width=width,
            max_area=height * width, _auto_resize=False, max_sequence_length=16, output_type="latent",
        )  # fmt: skip
        if "generator" not in arguments:
            defaults["generator"] = torch.Generator().manual_seed(seed)
        return pipe(**defaults | arguments).images

    return call


@pytest.fixture
def hooked():
    """Registers forward hooks that end with the test: pipelines share their autoencoder and text encoders."""
    handles = []

    def hook(module, function):
        handles.append(module.register_forward_hook(function))

    yield hook
    for handle in handles:
        handle.remove()


@pytest.fixture
def count_calls(hooked):
    """A list that grows with every call of some modules."""

    def count(*modules):
        calls = []
        for module in modules:
            hooked(module, lambda *_: calls.append(1))  # which returns None: the output stays
        return calls

    return count


@pytest.fixture(scope="session")
def encoded():
    """A picture as the bytes of its file."""

    def encode(image, form="PNG", **more):
        file = io.BytesIO()
        image.save(file, form, **more)
        return file.getvalue()

    return encode


@pytest.fixture
def gedit_rows(picture, encoded):
    """Rows of GEdit-Bench: each picture with an English and a Chinese instruction, the raw one of another shape."""
    rows = []
    for i, kind in enumerate(["color_alter", "color_alter", "subject-add"]):
        source = {"bytes": encoded(picture(64, 64, i)), "path": f"{i}.png"}
        raw = {"bytes": encoded(picture(64, 96, i)), "path": None}
        shared = {"task_type": kind, "input_image": source, "input_image_raw": raw, "Intersection_exist": True}
        for language, prompt in (("en", f"make it red {i}"), ("cn", f"变红 {i}")):
            key = f"{language}{i}"
            rows.append(shared | {"key": key, "instruction": prompt, "instruction_language": language})
    return rows


@pytest.fixture
def write_gedit(tmp_path):
    """Writes rows as the dataset's parquet files, two rows a group and at most four a file; the folder."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(rows, name="gedit"):
        data = tmp_path / name / "snapshots" / "abc" / "data"
        data.mkdir(parents=True)
        for i in range(0, len(rows), 4):
            table = pyarrow.Table.from_pylist(rows[i : i + 4])
            parquet.write_table(table, data / f"train-{i:05d}.parquet", row_group_size=2)
        return tmp_path / name

    return write


@pytest.fixture
def imgedit_folder(tmp_path, picture):
    """ImgEdit-Bench as it is downloaded: the list in one folder, the pictures in another."""
    folder = tmp_path / "imgedit"
    items = {
        "1082": {"id": "animal/000342021.jpg", "prompt": "make it red", "edit_type": "adjust"},
        "673": {"id": "style/000278574.png", "prompt": "make it blue", "edit_type": "style"},
        "68": {"id": "animal/000047206.png", "prompt": "make it green", "edit_type": "adjust"},
    }
    for i, item in enumerate(items.values()):
        path = folder / "Benchmark" / "singleturn" / item["id"]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(64, 64 + 32 * i, i).save(path)
    (folder / "Basic").mkdir()
    (folder / "Basic" / "basic_edit.json").write_text(json.dumps(items))
    return folder


@pytest.fixture(scope="session")
def qwen_parts():
    """Parts of an untrained embedded Qwen editor, with 2 blocks and random weights where it starts with zeros."""
    from diffusers import QwenImageTransformer2DModel

    from training.micro import build_qwen

    pipe = build_qwen.qwen()
    torch.manual_seed(0)
    config = {**pipe.transformer.config, "num_layers": 2}
    transformer = QwenImageTransformer2DModel.from_config(config).eval().requires_grad_(False)
    for parameter in transformer.parameters():  # as initialised its blocks hardly matter
        parameter.mul_(1.5)
    return {**pipe.components, "transformer": transformer}


@pytest.fixture(scope="session")
def make_small_qwen(qwen_parts):
    """Makes equal small Qwen pipelines that share no module."""
    from specedit.micro.pipelines import OwnSizeQwenImageEditPipeline

    own = copies_of(qwen_parts)

    def make():
        pipe = OwnSizeQwenImageEditPipeline(**{name: copies() for name, copies in own.items()})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def small_qwen(make_small_qwen):
    return make_small_qwen()


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported for the tests stays: the collector need not look through it now or later, nor so often."""
    gc.disable()
    collected = yield
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()
    return collected


@pytest.hookimpl(tryfirst=True)  # before xdist reads the option
def pytest_cmdline_main(config):
    """A run of all tests uses up to four cores, each test on one thread; `-n 0` for one process."""
    option = config.option
    if "PYTEST_XDIST_WORKER" in os.environ:  # a worker starts none of its own
        return
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and getattr(option, "numprocesses", 0) is None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        option.numprocesses, option.dist = min(4, os.cpu_count() or 1), "worksteal"


def pytest_addoption(parser):
    parser.addoption("--record-pictures", action="store_true", help="write tests/models/recorded_pictures.json anew")
    parser.addoption("--screenshots", action="store_true", help="write the pages' pictures in docs/images anew")
