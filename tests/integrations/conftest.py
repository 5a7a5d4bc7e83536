"""The servers that the plugins meet: stand-ins, or with SPECEDIT_HOSTS=FOLDER their released modules."""

import base64
import inspect
import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specedit.micro.loading import WEIGHTS
from tests.integrations import released, stand_ins

RELEASED = os.environ.get("SPECEDIT_HOSTS")
PROMPT = "a red square"
FOLDER = WEIGHTS / "kontext"
SIDE = 128  # px
SMALL = {"_auto_resize": False, "max_area": SIDE * SIDE}  # or the pipeline makes pictures of a million pixels


@pytest.fixture
def encoded():
    """Makes base64 of a picture's PNG."""

    def encode(picture):
        file = io.BytesIO()
        picture.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    return encode


class Sglang:
    """A pipeline in sglang, and what a client sends to it."""

    def __init__(self, pipe, monkeypatch):
        from specedit.integrations import sglang

        self.modules = released.sglang(Path(RELEASED)) if RELEASED else stand_ins.sglang_modules()
        self.server = self.modules.pop("server")
        if not RELEASED:
            stand_ins.put(monkeypatch, self.modules)
        sglang.register()
        registry = self._named("runtime.platforms.plugins", "HookRegistry")
        registry.apply_hooks()
        pipeline = self._named("runtime.pipelines.diffusers_pipeline", "DiffusersPipeline")
        stage = self._named("runtime.pipelines.diffusers_pipeline", "DiffusersExecutionStage")
        self.params = self._named("configs.sample.sampling_params", "SamplingParams")
        self.pipeline, self.stage = pipeline, stage.__new__(stage)
        self.pipe = self.stage.diffusers_pipe = pipeline._apply_cache_dit(None, pipe, self.server(needs_image=False))
        self.needs_image = False

    def _named(self, module, name):
        return self.modules[f"{stand_ins.SGLANG}.{module}"][name]

    def check(self, given, **fields):
        """What the HTTP process does with a request: the fields that reach sglang's sampling parameters."""
        server = self.server(self.needs_image)
        kwargs = dict(prompt=PROMPT, diffusers_kwargs=given, **fields)
        return self.params.from_user_sampling_params_args(model_path=str(FOLDER), server_args=server, **kwargs)

    def loaded(self):
        """The pipeline of an embedded editor, loaded by sglang."""
        pipeline = self.pipeline.__new__(self.pipeline)
        return pipeline._load_diffusers_pipeline(str(FOLDER), self.server(needs_image=False))

    def request(self, picture, steps=None, warms_up=False, **given):
        """What the worker does with a request; returns the edited picture (B, 3, H, W)."""
        batch = SimpleNamespace(
            prompt=PROMPT, negative_prompt="", num_inference_steps=30 if steps is None else steps, guidance_scale=2.5,
            true_cfg_scale=None, height=SIDE, width=SIDE, num_frames=1, generator=None, seed=0,
            generator_device="cpu", condition_image=picture, pixel_values=None, image_path=None,
            num_outputs_per_prompt=1, is_warmup=warms_up,
            extra={"diffusers_kwargs": SMALL | given, "explicit_fields": ["num_inference_steps"] * bool(steps)},
        )  # fmt: skip
        return self.stage.forward(batch, None).output


class Omni:
    """A pipeline in vLLM-Omni, and what a client sends to it."""

    def __init__(self, pipe, monkeypatch):
        from specedit.integrations import vllm_omni

        modules = released.vllm_omni(Path(RELEASED)) if RELEASED else stand_ins.omni_modules()
        adapter = modules.pop("adapter")
        if not RELEASED:
            stand_ins.put(monkeypatch, modules)
        self.registry = modules[stand_ins.OMNI]["PIPELINE_UTILS_REGISTRY"]
        self.ClientError = modules["vllm_omni.errors"]["OmniClientError"]
        vllm_omni.register()
        vllm_omni.register()
        self.pipe = pipe
        self.adapter = adapter.__new__(adapter)
        torch.nn.Module.__init__(self.adapter)
        self.adapter._pipeline, self.adapter._capabilities = pipe, {}
        self.adapter._pipeline_utils = self.registry[type(pipe).__name__]()
        self.adapter._pipeline_utils.apply_post_load_updates(pipe, None)
        pipe.transformer.set_attention_backend("native")  # as vLLM-Omni does after loading
        self.adapter._accept_call_kwargs = {*inspect.signature(pipe.__call__).parameters}
        self.adapter.od_config = SimpleNamespace(
            diffusers_call_kwargs=SMALL | {"num_inference_steps": 28}, output_type="pt"
        )

    def request(self, picture, steps=None, warms_up=False, mask_image=None, **given):
        data = {"image": [picture]} | ({} if mask_image is None else {"mask_image": mask_image})
        sampling = SimpleNamespace(
            num_inference_steps=2 if warms_up else steps, guidance_scale=2.5, height=SIDE, width=SIDE, seed=0,
            generator=None, generator_device="cpu", output_type=None, num_outputs_per_prompt=1, extra_args=given,
            enable_frame_interpolation=False,
        )  # fmt: skip
        batch = SimpleNamespace(
            prompts=[{"prompt": PROMPT, "multi_modal_data": data}], sampling_params=sampling,
            is_dummy_run=lambda: warms_up,
        )  # fmt: skip
        return self.adapter.forward(batch).output


@pytest.fixture
def sglang(pipe, monkeypatch):
    return Sglang(pipe, monkeypatch)


@pytest.fixture
def omni(pipe, monkeypatch):
    return Omni(pipe, monkeypatch)


@pytest.fixture(params=["sglang", "omni"])
def host(request):
    """Each server in turn."""
    return request.getfixturevalue(request.param)


def pytest_terminal_summary(terminalreporter):
    if RELEASED:
        terminalreporter.write_line(f"Stubs: {', '.join(sorted(released.STUBBED))}")
