"""A stand-in for a GPU: CPU tensors take the CUDA path, through Triton's own compiler and launchers, and nothing runs.

    from tools import standin
    recorder = standin.install()          # before the first kernel is launched, in a process that does nothing else
    ...                                   # call blocks and operators on CPU tensors
    recorder.launches                     # kernel, grid, warps, stages and arguments of every launch
    recorder.variants                     # what Triton had to compile, with the seconds that each took

Kernels are compiled for sm_90, or only recorded with ``install(mode="record")``. The results of operators are garbage.
What is real: which kernels are launched with what grid and arguments, which variants are compiled, and what the host
does for it.
"""

from .recording import Launched, Recorder, Variant, install

__all__ = ["Launched", "Recorder", "Variant", "install"]
