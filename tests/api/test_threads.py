"""Reports belong to requests, `disabled` to a thread."""

import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import specedit
from specedit.api.installing import is_active, last_report
from tests.api.common import CORNER, QUICK


@pytest.fixture
def ask(pipe, picture):
    """One request with its own number of steps; its whole output. No tokenizer: two threads must not share one."""
    embeds, pooled, _ = pipe.encode_prompt("make it red", None, max_sequence_length=16)

    def call(steps, **changes):
        arguments = dict(
            image=picture(64, 64), prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=64, width=64,
            max_area=64 * 64, _auto_resize=False, output_type="latent", num_inference_steps=steps,
            edit_mask=CORNER[:64, :64], generator=torch.Generator().manual_seed(steps),
        )  # fmt: skip
        return pipe(**arguments | changes)

    return call


def in_thread(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.slow
def test_forty_requests_in_four_threads_each_get_theirs(pipe, ask):
    specedit.install(pipe, steps=(0, 0, 1))
    alone = {steps: ask(steps).images for steps in range(1, 5)}
    together = threading.Barrier(4)

    def work(thread):
        together.wait(20)
        for i in range(10):
            steps = 1 + (thread + i) % 4
            output = ask(steps)
            mine = specedit.report(pipe)
            assert output.report is mine and mine.nfe == steps and last_report(pipe) is mine
            torch.testing.assert_close(output.images, alone[steps], rtol=1e-5, atol=1e-5)
        return mine

    with ThreadPoolExecutor(4) as pool:
        last = list(pool.map(work, range(4)))
    assert len({id(report) for report in last}) == 4
    assert specedit.report(pipe).nfe == 4  # of this thread's own last call


def test_a_thread_without_calls_sees_the_last_of_all(pipe, ask):
    specedit.install(pipe, steps=(1, 1, 1))
    assert in_thread(lambda: last_report(pipe)) is None
    ask(3)
    in_thread(lambda: ask(5))
    assert specedit.report(pipe).nfe == 3
    assert in_thread(lambda: specedit.report(pipe)).nfe == 5


def test_a_running_call_does_not_hide_the_last_one_from_others(pipe, ask):
    specedit.install(pipe, steps=(1, 1, 1))
    ask(4)
    seen = []

    def look(pipe, index, timestep, kwargs):
        seen.append(in_thread(lambda: specedit.report(pipe).nfe))
        assert last_report(pipe) is None  # this thread's last call is the running one
        return {}

    ask(3, callback_on_step_end=look)
    assert seen == [4, 4, 4]


def test_a_stock_call_in_one_thread_leaves_the_others_reports(pipe, ask):
    specedit.install(pipe, steps=(1, 1, 1))
    ask(3)

    def stock():
        with specedit.disabled(pipe):
            assert ask(1, edit_mask=None).report is None
        with pytest.raises(ValueError, match="the last one ran the stock pipeline: SpecEdit was disabled"):
            specedit.report(pipe)

    in_thread(stock)
    assert specedit.report(pipe).nfe == 3


def test_disabled_is_of_one_thread(pipe, ask):
    specedit.install(pipe, steps=(1, 1, 1))
    with specedit.disabled(pipe):
        assert not is_active(pipe)
        assert in_thread(lambda: is_active(pipe))
        assert in_thread(lambda: ask(3).report.nfe) == 3
    assert is_active(pipe)


@pytest.mark.slow
def test_threads_that_ended_leave_no_reports(pipe, ask):
    specedit.install(pipe, steps=(1, 1, 1))
    first = weakref.ref(in_thread(lambda: ask(3).report))
    in_thread(lambda: ask(3))
    gc.collect()
    assert first() is None


def test_the_report_is_no_item_of_the_output(pipe, ask):
    specedit.install(pipe, steps=(1, 1, 1))
    with specedit.disabled(pipe):
        stock = ask(1, edit_mask=None)
    output = ask(3)
    assert type(output) is type(stock) and output.report.nfe == 3
    assert len(output) == len(stock) == 1 and list(output) == list(output.keys()) == ["images"]
    assert output.to_tuple() == (output.images,) and output[0] is output["images"] is output.images
    assert repr(output) == f"{type(output).__name__}(images={output.images!r})" and "report" not in output
    for again in (copy.copy(output), copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert torch.equal(again.images, output.images) and list(again) == ["images"] and again.report.nfe == 3
    images = ask(3, return_dict=False)
    assert type(images) is tuple and len(images) == 1


def test_a_stock_path_gives_none(pipe, ask):
    specedit.install(pipe, **QUICK)
    with pytest.warns(UserWarning, match="sigmas were given"):
        output = ask(2, sigmas=[1.0, 0.5], edit_mask=None)
    assert output.report is None and last_report(pipe) is None
    with pytest.warns(UserWarning, match="any pixel may change"):
        assert type(ask(2, sigmas=[1.0, 0.5], return_dict=False)) is tuple


@pytest.mark.slow
def test_the_timestep_shown_to_a_callback_is_its_own_calls(pipe, ask):
    """Another thread's call replaces `pipe.current_timestep`, which all calls of one pipeline share."""
    specedit.install(pipe, steps=(1, 1, 1))

    def steps_of(shown):
        def callback(pipe, index, timestep, kwargs):
            shown.append(timestep.item())
            return {}

        return callback

    alone = []
    ask(6, callback_on_step_end=steps_of(alone))
    shown = [[] for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda own: ask(6, callback_on_step_end=steps_of(own)), shown))
    assert shown == [alone] * 4
