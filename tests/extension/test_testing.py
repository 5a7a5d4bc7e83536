"""The tests that are shipped."""

import subprocess
import sys


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_without_pytest_the_error_says_what_is_missing():
    done = run("import sys; sys.modules['pytest'] = None\nimport specedit.testing")
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "ImportError: specedit.testing: expected pytest, which is not installed; pip install pytest"
    )
