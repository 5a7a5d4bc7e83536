"""Small stand-ins for the servers: what their released modules do where SpecEdit meets them, without their imports.

`scripts/hosts.sh` runs the same tests with the released modules.
"""

import functools
import inspect
import sys
import types
from enum import Enum
from types import SimpleNamespace
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline

SGLANG = "sglang.multimodal_gen"
OMNI = "vllm_omni.diffusion.models.diffusers_adapter.pipeline_utils"


class HookType(Enum):
    BEFORE = "before"
    AFTER = "after"


class HookRegistry:
    hooks: ClassVar[dict] = {}

    @classmethod
    def register(cls, target, hook, hook_type):
        cls.hooks.setdefault(target, []).append((hook, hook_type))

    @classmethod
    def apply_hooks(cls):
        for target, hooks in cls.hooks.items():
            module, owner, name = target.rsplit(".", 2)
            owner = getattr(sys.modules[module], owner)
            static = isinstance(vars(owner)[name], staticmethod)
            for hook, kind in hooks:
                made = _wrapped(getattr(owner, name), hook, kind)
                setattr(owner, name, staticmethod(made) if static else made)


def _wrapped(original, hook, kind):
    @functools.wraps(original)
    def call(*args, **kwargs):
        if kind is HookType.BEFORE:
            args, kwargs = hook(*args, **kwargs) or (args, kwargs)
            return original(*args, **kwargs)
        result = original(*args, **kwargs)
        changed = hook(result, *args, **kwargs)
        return result if changed is None else changed

    return call


def sglang_modules():
    """The modules of sglang by their names; new classes each time, because hooks change them."""

    class SamplingParams:
        @staticmethod
        def from_user_sampling_params_args(model_path, server_args, *args, **kwargs):
            needs = server_args.pipeline_config.task_type.requires_image_input()
            if needs and not kwargs.get("image_path"):
                raise ValueError("requires an 'image_path' input")
            values = dict(num_inference_steps=30, guidance_scale=7.5, height=1024, width=1024, image_path=None)
            extra = {"explicit_fields": sorted(kwargs), "diffusers_kwargs": kwargs.get("diffusers_kwargs")}
            return SimpleNamespace(**values | kwargs, build_request_extra=lambda: extra)

    class DiffusersPipeline:
        def _load_diffusers_pipeline(self, model_path, server_args):
            return self._apply_cache_dit(DiffusionPipeline.from_pretrained(model_path), server_args)

        def _apply_cache_dit(self, pipe, server_args):
            return pipe

    class DiffusersExecutionStage:
        def __init__(self, pipe):
            self.diffusers_pipe = pipe

        def forward(self, batch, server_args):
            call = self._build_pipeline_kwargs(batch)
            named = inspect.signature(self.diffusers_pipe.__call__).parameters
            batch.output = self.diffusers_pipe(
                **{name: value for name, value in call.items() if name in named}, output_type="pt"
            ).images
            return batch

        def _build_pipeline_kwargs(self, batch):
            names = ("prompt", "num_inference_steps", "guidance_scale", "height", "width")
            call = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
            call["generator"] = torch.Generator().manual_seed(batch.seed)
            if batch.condition_image is not None:
                call["image"] = batch.condition_image
            return call | batch.extra.get("diffusers_kwargs", {})

    def server(needs_image):
        task = SimpleNamespace(requires_image_input=lambda: needs_image)
        return SimpleNamespace(pipeline_config=SimpleNamespace(task_type=task))

    registry = type("HookRegistry", (HookRegistry,), {"hooks": {}})
    return {
        "server": server,
        f"{SGLANG}.runtime.platforms.plugins": dict(HookRegistry=registry, HookType=HookType),
        f"{SGLANG}.runtime.pipelines.diffusers_pipeline": dict(
            DiffusersPipeline=DiffusersPipeline, DiffusersExecutionStage=DiffusersExecutionStage
        ),
        f"{SGLANG}.configs.sample.sampling_params": dict(SamplingParams=SamplingParams),
    }


class OmniAdapter(torch.nn.Module):
    """vLLM-Omni's wrapper of a pipeline: `_pipeline`, `_pipeline_utils`, `od_config` and what the call accepts."""

    def forward(self, req):
        sampling, accepted = req.sampling_params, self._accept_call_kwargs
        given = self.od_config.diffusers_call_kwargs | req.prompts[0]["multi_modal_data"]
        given |= {"prompt": req.prompts[0]["prompt"]}
        given |= {name: value for name, value in vars(sampling).items() if value is not None}
        call = {name: value for name, value in given.items() if name in accepted}
        self._pipeline_utils.update_call_kwargs(req, sampling, accepted, call)
        call |= dict(output_type="pt", generator=torch.Generator().manual_seed(sampling.seed))
        with torch.inference_mode():
            return SimpleNamespace(output=self._pipeline(**call).images)


def omni_modules():
    """The modules of vLLM-Omni by their names."""

    class BasePipelineUtils:
        def apply_post_load_updates(self, pipeline, od_config):
            pass

        def update_call_kwargs(self, req, sampling, accepted_call_kwargs, call_kwargs):
            pass

    class OmniClientError(ValueError):
        status_code = 400

    return {
        "adapter": OmniAdapter,
        OMNI: dict(BasePipelineUtils=BasePipelineUtils, PIPELINE_UTILS_REGISTRY={}),
        "vllm_omni.errors": dict(OmniClientError=OmniClientError),
    }


def put(monkeypatch, modules):
    """Put modules where `import` finds them, for one test."""
    for name, values in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            package = ".".join(parts[:end])
            if package not in sys.modules:
                made = types.ModuleType(package)
                made.__path__ = []
                monkeypatch.setitem(sys.modules, package, made)
            if end > 1:
                parent = sys.modules[".".join(parts[: end - 1])]
                monkeypatch.setattr(parent, parts[end - 1], sys.modules[package], raising=False)
        for attribute, value in values.items():
            monkeypatch.setattr(sys.modules[name], attribute, value, raising=False)
