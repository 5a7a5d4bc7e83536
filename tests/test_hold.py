"""A lock that an interrupt leaves unlocked, wherever it comes."""

import sys
import threading

from specedit.hold import Hold


def free(lock):
    """Whether another thread can take the lock."""
    got = []
    thread = threading.Thread(target=lambda: got.append(lock.acquire(blocking=False)))
    thread.start()
    thread.join()
    return got[0]


def test_a_hold_excludes_other_threads_inside_its_block_only():
    lock = threading.RLock()
    with Hold(lock):
        assert not free(lock)
        with Hold(lock):
            pass
        assert not free(lock)
    assert free(lock)


def test_an_interrupt_at_any_line_releases_the_lock(monkeypatch):
    failed = []  # in deleting a hold
    monkeypatch.setattr(sys, "unraisablehook", lambda error: failed.append(error.exc_type))

    def work(lock):
        with Hold(lock):
            pass
        return "done"

    def at(n):
        lines = 0

        def trace(frame, event, argument):
            nonlocal lines
            if frame.f_code.co_filename not in (__file__, Hold.__enter__.__code__.co_filename):
                return None
            if event == "line":
                lines += 1
                if lines == n:
                    raise KeyboardInterrupt
            return trace

        return trace

    for n in range(1, 100):
        lock, before = threading.RLock(), sys.gettrace()
        sys.settrace(at(n))
        try:
            ended = work(lock) == "done"
        except KeyboardInterrupt:
            ended = False
        finally:
            sys.settrace(before)
        assert free(lock) and set(failed) <= {KeyboardInterrupt}, f"line {n}"
        if ended:
            break
    assert ended and n > 5
