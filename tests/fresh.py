"""Python code in fresh processes, forked from one that has imported torch and nothing of this package.

Importing torch takes most of the two seconds of a process that starts by itself.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import annnet_kernels

CHECKOUT = Path(annnet_kernels.__file__).parents[1]

_SERVER = """
import json, os, sys, torch
for line in sys.stdin:
    code, folder, environment, outputs = json.loads(line)
    child = os.fork()
    if not child:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.path[0] = folder
        for descriptor, output in enumerate(outputs, 1):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), descriptor)
        exec(code, {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends with the tests, as its input does."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", _SERVER]
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def python(code: str, folder: Path = CHECKOUT, **environment: str) -> subprocess.CompletedProcess[str]:
    """What ``python -c code`` does in ``folder``, from which it imports this package."""
    server = _server()
    with tempfile.TemporaryDirectory() as temporary:
        outputs = [Path(temporary, name) for name in ("stdout", "stderr")]
        request = [code, str(folder), {**os.environ, **environment}, [str(output) for output in outputs]]
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, status, *(output.read_text() for output in outputs))
