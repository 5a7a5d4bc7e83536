"""The servers' released modules, unmodified, from a folder that `scripts/hosts.sh` fills.

Third-party packages that are not installed are stubs: any name in them is a class that takes anything. The servers' own
modules are never stubs. Packages in `BARE` are entered without running their `__init__`, which patches CUDA builds of
other libraries.
"""

import importlib.machinery
import inspect
import sys
import types
from importlib import import_module
from pathlib import Path

from tests.integrations.stand_ins import OMNI, SGLANG

BARE = ("sglang", "sglang.srt", "vllm", "vllm_omni")
ABSENT = ("amdsmi", "libtpu", "tpu_inference", "torch_npu", "triton_kernels", "aiter", "winreg")  # they do without
STUBBED: set[str] = set()


class Permissive(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub

    def __or__(cls, other):
        return object

    __ror__ = __or__

    def __getitem__(cls, key):
        return cls


class Stub(metaclass=Permissive):
    """A base class, a decorator, a function or a constant of a package that is not installed."""

    def __new__(cls, *args, **kwargs):
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else super().__new__(cls)

    def __init_subclass__(cls, **kwargs):
        pass

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return getattr(Stub, name)

    def __call__(self, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) else Stub()

    @classmethod
    def __get_pydantic_core_schema__(cls, source, handler):
        from pydantic_core import core_schema

        return core_schema.any_schema()


class StubModule(types.ModuleType):
    __path__: list = []  # noqa: RUF012

    def __getattr__(self, name):
        return getattr(Stub, name)


class Finder:
    """Makes stubs of packages that a server's module imports and that are not installed."""

    def __init__(self, folder):
        self.folder = str(folder)

    def find_spec(self, name, path, target=None):
        top = name.partition(".")[0]
        if top in ABSENT or top in {bare.partition(".")[0] for bare in BARE}:
            return None
        asks = sys._getframe(1)
        while asks is not None and "importlib" in asks.f_code.co_filename:
            asks = asks.f_back
        if top not in STUBBED and (asks is None or not asks.f_code.co_filename.startswith(self.folder)):
            return None
        STUBBED.add(top)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StubModule(spec.name)

    def exec_module(self, module):
        pass


def _enter(folder: Path, *packages: str) -> None:
    """Put packages of the folder where `import` finds them, the installed ones first."""
    # What looks for optional packages does so before there are stubs.
    import_module("diffusers.pipelines.flux.pipeline_flux_kontext")

    if any(isinstance(finder, Finder) for finder in sys.meta_path):
        return
    sys.path += [str(folder / "packages"), *(str(folder / name.partition(".")[0]) for name in packages)]
    sys.meta_path.append(Finder(folder))
    for name in packages:
        module = types.ModuleType(name)
        module.__path__ = [str(folder / name.partition(".")[0] / name.replace(".", "/"))]
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__spec__.submodule_search_locations = module.__path__
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def sglang(folder: Path) -> dict[str, dict]:
    """The modules of sglang by their names. Hooks of an earlier test are taken off."""
    _enter(folder.resolve(), "sglang", "sglang.srt")
    plugins, pipelines, sampling = (
        import_module(f"{SGLANG}.{name}")
        for name in (
            "runtime.platforms.plugins",
            "runtime.pipelines.diffusers_pipeline",
            "configs.sample.sampling_params",
        )
    )
    plugins.HookRegistry.reset()
    for owner, names in (
        (pipelines.DiffusersPipeline, ("_apply_cache_dit",)),
        (pipelines.DiffusersExecutionStage, ("_build_pipeline_kwargs",)),
        (sampling.SamplingParams, ("from_user_sampling_params_args",)),
    ):
        for name in names:
            raw = vars(owner)[name]
            stock = inspect.unwrap(raw.__func__ if isinstance(raw, staticmethod) else raw)
            setattr(owner, name, staticmethod(stock) if isinstance(raw, staticmethod) else stock)
    return {"server": _sglang_server} | {module.__name__: vars(module) for module in (plugins, pipelines, sampling)}


def _sglang_server(needs_image: bool) -> types.SimpleNamespace:
    """Arguments of `sglang serve --backend diffusers`, as far as loading and a request's check read them."""
    configs = import_module(f"{SGLANG}.configs.pipeline_configs.diffusers_generic")
    backend = import_module(f"{SGLANG}.runtime.server_args.server_args").Backend.DIFFUSERS
    config = configs.DiffusersI2IPipelineConfig if needs_image else configs.DiffusersGenericPipelineConfig
    return types.SimpleNamespace(
        backend=backend, model_id=None, pipeline_class_name=None, output_path=None, comfyui_mode=False, num_gpus=1,
        pipeline_config=config(dit_precision="fp32"), trust_remote_code=False, revision=None, component_residency=None,
        should_cpu_offload_component=lambda name: False, attention_backend=None, cache_dit_config=None,
        enable_torch_compile=False, component_precisions={},
    )  # fmt: skip


def vllm_omni(folder: Path) -> dict[str, dict]:
    """The modules of vLLM-Omni by their names, and the class that wraps a pipeline."""
    _enter(folder.resolve(), "vllm", "vllm_omni")
    package = OMNI.rpartition(".")[0]
    adapter = import_module(f"{package}.pipeline_diffusers_adapter").DiffusersAdapterPipeline
    found = {name: vars(import_module(name)) for name in (OMNI, "vllm_omni.errors")}
    return {"adapter": adapter, **found}
