"""A Python whose processes begin with torch and diffusers imported: a pytest plugin which tests/conftest.py loads.

Those imports are most of what a short command costs. Its processes are forked from one that has done nothing but them,
so what a command imports of this project is imported by itself. They have their own arguments, environment, working
folder and standard streams, and end as other processes do.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORTED = ("torch", "numpy", "PIL.Image", "transformers", "diffusers.pipelines.flux.pipeline_flux_kontext")
# Passes a command on, waits for its end, and ends likewise; other forms than these three are real Python's.
COMMAND = """#!{python} -ISs
import json, os, signal, socket, sys
given = sys.argv[1:]
if not given or given[0].startswith("-") and given[0] not in ("-m", "-c"):
    os.execv({python!r}, [{python!r}, *given])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
body = json.dumps([os.path.abspath(sys.argv[0]), given, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(body).to_bytes(4, "big")], [0, 1, 2])
server.sendall(body)
status = server.recv(4)
if not status:
    sys.exit("the process that imports has ended")
code = os.waitstatus_to_exitcode(int.from_bytes(status, "big"))
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def serve(listener):
    """Fork a process for every request. Returns, in that process, the request: see `run`."""
    running = {}  # by process id: what is readable when it has ended, and who asked for it
    with selectors.DefaultSelector() as awaited:
        awaited.register(listener, selectors.EVENT_READ)
        awaited.register(0, selectors.EVENT_READ)  # ends with the tests
        while True:
            for key, _ in awaited.select():
                if key.fileobj == 0:
                    for child in running:
                        os.kill(child, signal.SIGKILL)
                        os.waitpid(child, 0)
                    sys.exit()
                if key.fileobj is listener:
                    connection, streams, request = receive(listener)
                    child = os.fork()
                    if child == 0:
                        for number, stream in enumerate(streams):
                            os.dup2(stream, number)
                        held = [other for pair in running.values() for other in pair if other is not None]
                        for one in (listener, connection, *held):
                            os.close(one) if isinstance(one, int) else one.close()
                    for stream in streams:
                        os.close(stream)
                    if child == 0:
                        return request
                    running[child] = os.pidfd_open(child), connection
                    for one in running[child]:
                        awaited.register(one, selectors.EVENT_READ, child)
                elif key.data in running:
                    child, (ended, connection) = key.data, running[key.data]
                    if key.fileobj is connection:  # whoever asked is gone
                        os.kill(child, signal.SIGKILL)
                        running[child] = ended, None
                    else:
                        status = os.waitpid(child, 0)[1]
                        awaited.unregister(ended)
                        os.close(ended)
                        del running[child]
                    if connection is not None:
                        awaited.unregister(connection)
                        if key.fileobj is not connection:
                            connection.send(status.to_bytes(4, "big"))
                        connection.close()


def receive(listener):
    """A connection, the standard streams that it hands over, and its request."""
    connection = listener.accept()[0]
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as stream:
        return connection, streams, json.loads(stream.read(int.from_bytes(size, "big")))


def run(executable, given, folder, environment):
    """What `executable *given` does there."""
    sys.executable = executable
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    kind, *rest = given
    first = "" if kind in ("-m", "-c") else str(Path(kind).resolve().parent)
    sys.path[:1] = [
        folder if kind == "-m" else first,
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.argv = given
        runpy.run_path(kind, run_name="__main__")


@contextlib.contextmanager
def serving(imported):
    """A folder for the PATH, with a `python3` whose processes have imported these. One thread, and without the hub."""
    with tempfile.TemporaryDirectory() as folder:  # a socket's address is short
        command, address = Path(folder) / "bin" / "python3", str(Path(folder) / "socket")
        command.parent.mkdir()
        if not hasattr(os, "pidfd_open"):
            command.symlink_to(sys.executable)
            yield command.parent
            return
        command.write_text(COMMAND.format(python=sys.executable, address=address))
        command.chmod(0o755)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            start = [sys.executable, __file__, str(listener.fileno()), *imported]
            with subprocess.Popen(
                start, env=environment, stdin=subprocess.PIPE, pass_fds=[listener.fileno()]
            ) as server:
                yield command.parent
                server.stdin.close()


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    run(*serve(socket.socket(fileno=int(sys.argv[1]))))
else:
    import pytest

    @pytest.fixture(scope="session")
    def warm_python():
        """A folder for the PATH, with a `python3` whose processes have imported torch and diffusers."""
        with serving(IMPORTED) as folder:
            yield folder
