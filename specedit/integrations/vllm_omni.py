"""SpecEdit in vLLM-Omni's diffusers backend, through the entry-point group `vllm_omni.general_plugins`.

vLLM-Omni calls `register` in every process. It adds SpecEdit to what vLLM-Omni does with each pipeline class that
SpecEdit serves. docs/servers.md says how to use it.
"""

from __future__ import annotations

from typing import Any

from . import serving

MASK = "mask_image"  # how the edits endpoint names its mask


def register() -> None:
    """Add SpecEdit to the registry of pipelines; the entry point. May be called again."""
    try:
        from vllm_omni.diffusion.models.diffusers_adapter import pipeline_utils
    except ImportError as error:  # it must not stop servers of other models
        serving.logger.warning("expected a vLLM-Omni with a diffusers backend, got one without: %s", error)
        return
    from ..models.registry import pipeline_names

    registry = pipeline_utils.PIPELINE_UTILS_REGISTRY
    for name in (one.strip() for names in pipeline_names() for one in names.split(",")):
        before = registry.get(name, pipeline_utils.BasePipelineUtils)
        if not getattr(before, "of_specedit", False):
            registry[name] = with_specedit(before)


def with_specedit(base: type) -> type:
    """A subclass of vLLM-Omni's hooks of a pipeline class that also installs SpecEdit and reads its settings."""
    stock: Any = base

    class SpecEditUtils(stock):  # type: ignore[misc]
        of_specedit = True

        def apply_post_load_updates(self, pipeline: Any, od_config: Any) -> None:
            super().apply_post_load_updates(pipeline, od_config)
            serving.install(pipeline)
            self.pipeline = pipeline

        def update_call_kwargs(self, req: Any, sampling: Any, accepted: Any, call: dict[str, Any]) -> None:
            super().update_call_kwargs(req, sampling, accepted, call)
            request = dict(sampling.extra_args or {})
            if MASK not in (accepted or ()) and (mask := _mask_of(req)) is not None:
                request.setdefault("edit_mask", mask)
            # A load-time default, or the dummy run at start, is not what a client asks for.
            asks = sampling.num_inference_steps is not None and not req.is_dummy_run()
            try:
                serving.prepare(self.pipeline, call, request, asks_steps=asks)
            except (TypeError, ValueError) as error:
                from vllm_omni.errors import OmniClientError

                raise OmniClientError(str(error)) from error

    return SpecEditUtils


def _mask_of(req: Any) -> Any:
    """The mask of the edits endpoint, if the request has one."""
    prompt = req.prompts[0] if req.prompts else None
    data = prompt.get("multi_modal_data") if isinstance(prompt, dict) else None
    return (data or {}).get(MASK)
