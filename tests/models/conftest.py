"""What the tests of adapters share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_here():
    """Tiny tensors gain nothing from threads, and lose much where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
