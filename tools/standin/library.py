"""Builds the stand-in's libcuda from ``driver.c`` and makes this process load it in the place of a real one."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("driver.c")
NAME = "libcuda.so.1"


def build() -> Path:
    """The folder that holds the library, compiled with ``cc`` unless it lies there already.

    Raises:
        RuntimeError: the C compiler is missing or refuses the source.
    """
    text = SOURCE.read_bytes()
    folder = Path(tempfile.gettempdir()) / f"annnet-standin-{os.getuid()}-{hashlib.sha256(text).hexdigest()[:12]}"
    library = folder / NAME
    if library.exists():
        return folder
    folder.mkdir(exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / NAME
        command = [
            os.environ.get("CC", "cc"),
            "-shared",
            "-fPIC",
            "-O1",
            f"-Wl,-soname,{NAME}",
            "-o",
            str(made),
            str(SOURCE),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(f"the stand-in driver needs a C compiler: {error}") from error
        if done.returncode:
            raise RuntimeError(f"the stand-in driver does not compile: {done.stderr.strip()}")
        made.replace(library)  # at once, for others may build it at the same time
    return folder


def load() -> None:
    """Load the library for all of this process: what later opens libcuda.so.1 by name finds this one."""
    folder = build()
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)  # where Triton looks when it links its launchers
    ctypes.CDLL(str(folder / NAME), mode=ctypes.RTLD_GLOBAL)
