"""What the tests of adapters use together."""

import inspect

import pytest
import torch

import specedit

QUICK = dict(steps=(2, 1, 1), draft_steps=2)
MADE_ONCE = pytest.StashKey[dict[str, tuple[torch.Tensor, specedit.RunReport | None]]]()  # what `run_once` gave


def corner():
    """An edit mask of some cells."""
    mask = torch.zeros(8, 8)
    mask[2:5, 2:5] = 1
    return mask


class Cases:
    """Helpers of the tests. A subclass has a fixture `family`."""

    @pytest.fixture
    def run_once(self, request):
        """(family, settings or None for stock, a call of plain values) to (latents, report) of a new pipeline.

        One run serves all tests of the class that ask for it.
        """
        made_once = request.node.getparent(pytest.Class).stash.setdefault(MADE_ONCE, {})
        params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        own = inspect.signature(request.function).parameters.keys() - {"family"}
        variant = sorted((name, repr(value)) for name, value in params.items() if name not in own)  # of the family

        def run(family, settings, **call):
            key = repr((family.adapter, variant, settings, sorted(call.items())))
            if key not in made_once:
                pipe = family.make() if settings is None else specedit.install(family.make(), **settings)
                latents = family.run(pipe, **call)
                made_once[key] = latents, None if settings is None else specedit.report(pipe)
            latents, report = made_once[key]
            return latents.clone(), report

        return run

    def close(self, a, b, tolerance=2e-4):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

    @pytest.fixture
    def count_calls(self):
        """A list that grows with every call of some modules."""
        handles = []

        def count(*modules):
            calls = []
            handles.extend(module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in modules)
            return calls

        yield count
        for handle in handles:
            handle.remove()

    def needs(self, family, changes):
        """Skips a test whose configuration the family does not run."""
        offered = {"attention": family.attention, "rope": family.ropes}
        if any(name in changes and changes[name] not in values for name, values in offered.items()):
            pytest.skip(f"this family does not run {changes}")

    def stage_names(self, family):
        """The stages of a run, in order."""
        return ["coarse", "mixed", "full"] if family.masked else ["draft", "coarse", "mixed", "full"]

    def guides(self, family, guided=None):
        """Arguments of calls without guidance and, if the family has it, with it; `guided` chooses one of the two.

        Settings that guidance does not depend on are tried with one each: over all tests every pair is met.
        """
        every = [{}] if family.guided is None else [{}, family.guided]
        return every if guided is None else every[-1:] if guided else every[:1]
