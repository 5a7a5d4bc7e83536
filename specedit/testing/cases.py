"""What the tests of adapters use together."""

import pytest
import torch

QUICK = dict(steps=(2, 1, 1), draft_steps=2)


class Cases:
    """Helpers of the tests. A subclass has a fixture `family`."""

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
