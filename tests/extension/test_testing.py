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


def test_nothing_else_imports_pytest():
    done = run("import sys, specedit.cli, specedit.api.installing; print('pytest' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_no_test_of_the_repository_is_needed():
    code = "import sys, specedit.testing; print([name for name in sys.modules if name.partition('.')[0] == 'tests'])"
    done = run(code)
    assert done.stdout == "[]\n", done.stderr
