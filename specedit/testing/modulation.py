"""Tests of modulation="once": every adapter keeps the modulation of a run, or stands aside and says why."""

import copy
import inspect
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload

import specedit
from specedit import SpecEditConfig
from specedit.layout import MixedLayout
from specedit.method.adapter import Run
from specedit.models.shared.modulation import Hook

from .cases import QUICK, Cases
from .family import group_of, inside, trace

SIGMAS = [1.0, 0.9, 0.55, 0.2, 0.05]
ONCE = QUICK | dict(modulation="once")
NO_EFFECT = "modulation='once' has no effect"


class ModulationConformance(Cases):
    """Tests of modulation that is computed once for all timesteps."""

    def keeping(self, family, pipe):
        """The layers of a family that keeps its modulation on this pipeline; others are skipped."""
        if not keeps_modulation(family, pipe):
            pytest.skip("this adapter computes its modulation in every step")
        return family.adapter.modulation_layers

    def test_modulation_is_made_once_or_in_every_step_with_a_reason(self, family, run_once):
        for guide in self.guides(family):
            expected, _ = run_once(family, QUICK, **guide)
            pipe = specedit.install(family.make(), **ONCE)
            before, reason = trace(pipe), family.adapter().why_modulated_every_step(pipe)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                latents, made = family.run(pipe, **guide), specedit.report(pipe).modulation
            said = [str(one.message) for one in caught if NO_EFFECT in str(one.message)]
            if reason is not None:
                assert torch.equal(latents, expected) and made == {} and said == [f"{NO_EFFECT}: {reason}"]
                continue
            self.close(latents, expected)
            assert not said and 1 <= made["passes"] <= (6 if guide else 3) and made["bytes"] > 0
            assert all(a is b for a, b in zip(before[2], trace(pipe)[2], strict=True))
        stock, _ = run_once(family, None, num_inference_steps=2)
        assert torch.equal(family.run(specedit.uninstall(pipe), num_inference_steps=2), stock)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_modulation_made_once_is_as_exact_as_that_of_every_step(self, family, dtype):
        """Against float64: the largest error is at most twice the other's."""
        pipe = copy.deepcopy(family.make()).to(dtype)  # pipelines may share their weights
        spec = self.keeping(family, pipe)
        embedder = pipe.transformer.get_submodule(spec.embedder)
        layers = [layer for layer, _ in spec.find(pipe.transformer)]
        kept, given = self.modulation_of_steps(family, pipe, spec, embedder)
        exact = copy.deepcopy(embedder).double(), [copy.deepcopy(layer).double() for layer in layers]
        errors = {"step": 0.0, "once": 0.0}
        for sigma, args in given.items():
            wide = [x.double() if isinstance(x, torch.Tensor) else x for x in args]
            wide = [torch.float64 if isinstance(x, torch.dtype) else x for x in wide]
            references = modulation(*exact, wide)
            for module, step, reference in zip(
                (embedder, *layers), modulation(embedder, layers, args), references, strict=True
            ):
                # Some layers are not given the rows of timestep 0.
                once = kept[sigma, module]
                for name, made in (("step", step[: len(once)]), ("once", once)):
                    error = (made.double() - reference[: len(once)]).abs().max().item()
                    errors[name] = max(errors[name], error)
        assert 0 < errors["once"] <= 2 * errors["step"], errors

    def modulation_of_steps(self, family, pipe, spec, embedder):
        """What every module gave in every step of a run that keeps it, and what the embedder is given otherwise."""
        adapter, state = family.prepare(pipe)
        kept, given, calls = {}, {}, []

        def run_steps(run):
            group = group_of(state, MixedLayout.all_fine(state.grid), state.noise)
            group.sigmas = [*SIGMAS, 0.0]
            for sigma in (SIGMAS[0], *SIGMAS):  # the first step may compute what the others find
                adapter.predict(run, group, sigma)
                given[sigma] = calls[-1:]

        run = Run(adapter, pipe, SpecEditConfig(), state)
        with torch.no_grad(), adapter.modulated_once(run, SIGMAS):
            output = run.modulation.output

            def seen(hook, step, count):
                kept[step.sigma, hook.module] = output(hook, step, count)
                return kept[step.sigma, hook.module]

            run.modulation.output = seen
            run_steps(run)
            assert run.modulation.passes == 1 and run.modulation.memory > 0
        handle = embedder.register_forward_pre_hook(lambda module, args: calls.append(args))
        with torch.no_grad():
            run_steps(Run(adapter, pipe, SpecEditConfig(), state))
        handle.remove()
        return kept, {sigma: args for sigma, (args,) in given.items()}

    def test_kept_modulation_is_of_its_run_alone(self, family, run_once):
        """Another thread's stock call, in the middle of a run, is stock's; and so are two runs at once."""
        pipe, other = family.make(), family.make()
        spec = self.keeping(family, pipe)
        stock, _ = run_once(family, None, num_inference_steps=2)
        expected, _ = run_once(family, ONCE)
        specedit.install(pipe, **ONCE)
        other.transformer = pipe.transformer
        images, here, but = [], threading.get_ident(), [layer for layer, _ in spec.find(pipe.transformer)]

        def in_another_thread(*_):
            if threading.get_ident() == here and not images:
                images.append(None)
                for steps in (dict(num_inference_steps=2), {}):
                    if not steps:
                        specedit.install(other, **ONCE)
                    thread = threading.Thread(target=lambda steps=steps: images.append(family.run(other, **steps)))
                    thread.start()
                    thread.join()

        handle = inside(pipe, lambda: family.run(pipe), but).register_forward_pre_hook(in_another_thread)
        assert torch.equal(family.run(pipe), expected)
        handle.remove()
        self.close(images[1], stock, 1e-5)
        self.close(images[2], expected, 1e-5)

    @pytest.mark.parametrize("offload", ["models", "modules"])
    def test_kept_modulation_of_offloaded_weights(self, family, run_once, offload):
        self.keeping(family, pipe := family.make())
        expected, _ = run_once(family, QUICK)
        pipe.transformer = copy.deepcopy(pipe.transformer)
        if offload == "models":
            for name, part in pipe.components.items():
                if isinstance(part, torch.nn.Module):
                    setattr(pipe, name, copy.deepcopy(part))
            pipe.enable_model_cpu_offload(device="cpu")
        else:
            cpu_offload(pipe.transformer, torch.device("cpu"))
        specedit.install(pipe, **ONCE)
        self.close(family.run(pipe), expected)
        assert specedit.report(pipe).modulation["passes"] >= 1
        assert not any(isinstance(forward, Hook) for forward in trace(pipe)[2])

    def test_kept_modulation_under_a_lora_on_its_own_layers(self, family):
        """At full scale and, where a call can say so, at half."""
        peft = pytest.importorskip("peft")
        pipe = family.make()
        spec, pipe.transformer = self.keeping(family, pipe), copy.deepcopy(pipe.transformer)
        plain = family.run(pipe, num_inference_steps=2)
        own = [layer for layer, _ in spec.find(pipe.transformer)]
        names = [name for name, module in pipe.transformer.named_modules() if any(module is layer for layer in own)]
        pipe.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False))
        assert not self.is_close(family.run(pipe, num_inference_steps=2), plain)
        known = inspect.signature(pipe.__call__).parameters
        scaled = [{name: {"scale": 0.5}} for name in ("attention_kwargs", "joint_attention_kwargs") if name in known]
        latents = []
        for changes in ({}, dict(modulation="once")):
            specedit.install(pipe, **QUICK, **changes)
            latents.append([family.run(pipe, **more) for more in ({}, *scaled)])
        assert specedit.report(pipe).modulation["passes"] >= 1
        for step, once in zip(*latents, strict=True):
            self.close(once, step)

    @staticmethod
    def is_close(a, b):
        return torch.allclose(a, b, rtol=2e-4, atol=2e-4)


def keeps_modulation(family, pipe):
    """Whether the family keeps its modulation on this pipeline."""
    return family.adapter().why_modulated_every_step(pipe) is None


def modulation(embedder, layers, args):
    """Of every module, for what the embedder is given."""
    with torch.no_grad():
        embedding = embedder(*args)
        return [embedding, *(layer(F.silu(embedding)) for layer in layers)]
