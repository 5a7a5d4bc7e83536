"""What a run costs: operations from its forward calls, and roofline seconds on a GPU that is not at hand."""

from . import flops as flops
