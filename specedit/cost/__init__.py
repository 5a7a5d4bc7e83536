"""What a run costs: operations from its forward calls, and roofline seconds on a GPU, without the GPU."""

from . import flops as flops
