"""SpecEdit in `sglang serve --backend diffusers`, through the entry-point group `sglang.multimodal_gen.plugins`.

sglang calls `register` in every process of the server. It hooks three places of sglang: where a pipeline has been
loaded, where a request's arguments become those of the pipeline's call, and where a request is checked.
docs/servers.md says how to use it.
"""

from __future__ import annotations

from typing import Any

from . import request_files, serving

PIPELINE = "sglang.multimodal_gen.runtime.pipelines.diffusers_pipeline"
LOADED = f"{PIPELINE}.DiffusersPipeline._apply_cache_dit"  # the last step that sees the pipeline before torch.compile
CALL = f"{PIPELINE}.DiffusersExecutionStage._build_pipeline_kwargs"
CHECK = "sglang.multimodal_gen.configs.sample.sampling_params.SamplingParams.from_user_sampling_params_args"
KWARGS = "diffusers_kwargs"


def register() -> None:
    """Register the hooks; the entry point."""
    # The registry of sglang's language models has the same face, and its hooks never reach the diffusion server.
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    HookRegistry.register(LOADED, after_loading, HookType.AFTER)
    HookRegistry.register(CALL, after_building, HookType.AFTER)
    HookRegistry.register(CHECK, before_sampling, HookType.BEFORE)


def after_loading(pipe: Any, pipeline: Any, loaded: Any, server_args: Any) -> Any:
    """Install SpecEdit on the pipeline that sglang has loaded."""
    serving.install(pipe)
    return pipe


def after_building(call: dict[str, Any], stage: Any, batch: Any) -> dict[str, Any]:
    """Turn a request's settings into those of the next call."""
    given = (batch.extra or {}).get(KWARGS) or {}
    # sglang sends its own default of num_inference_steps where the client sent none.
    explicit = {*((batch.extra or {}).get("explicit_fields") or ()), *given}
    asks = serving.STEPS in explicit and not batch.is_warmup
    serving.prepare(stage.diffusers_pipe, call, given, asks_steps=asks)
    return call


def before_sampling(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Check a request where its error is the client's, status 400, and not the worker's, status 500."""
    given = kwargs.get(KWARGS)
    if not isinstance(given, dict):
        return None
    if any(given.get(name) is not None for name in serving.NAMES):
        serving.check(given)
    server_args = kwargs.get("server_args") or (args[1] if len(args) > 1 else None)
    if isinstance(given.get("image"), str) and not kwargs.get("image_path") and _needs_image(server_args):
        return args, kwargs | {"image_path": [_for_sglang(given["image"])]}
    return None


def _needs_image(server_args: Any) -> bool:
    """Whether sglang refuses requests of the model without a picture of its own endpoint's."""
    task = getattr(getattr(server_args, "pipeline_config", None), "task_type", None)
    return bool(task is not None and task.requires_image_input())


def _for_sglang(image: str) -> str:
    """A picture as sglang reads it: an absolute path, or a data URL."""
    if request_files.is_path(image):
        return str(request_files.locate("image", image, serving.Server.from_environment().files))
    return image if image.startswith("data:") else f"data:image/png;base64,{image}"
