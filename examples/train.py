"""Train and evaluate ANNNet for semantic segmentation.

    python examples/train.py --data CAMVID                              # ResNet-50, one process
    python examples/train.py --data CAMVID --width-small --steps 40     # minutes on a CPU
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1    # else torchrun's restarts meet the addresses of dead processes
    torchrun --nproc-per-node 8 --max-restarts 3 examples/train.py --data CITYSCAPES --dataset cityscapes --crop 769

``--help`` lists every option. Ctrl-C and SIGTERM save before they end the run; ``--resume`` continues it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from segmentation.distributed import joined
from segmentation.errors import UserError
from segmentation.monitor import Monitor
from segmentation.options import parse
from segmentation.results import write_results
from segmentation.signals import StopRequest
from segmentation.training import Training, train


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 2 for what the user can put right, or 128 plus the signal that ended the run."""
    try:
        options = parse(arguments)
        with joined(options.device) as processes, StopRequest() as stop:
            training = Training(options, processes)
            training.resume()
            with Monitor(options, training.step, processes.leads) as monitor:
                if number := train(training, monitor, stop):
                    return 128 + number
                stop.release()  # everything is saved
                scores = training.evaluate(monitor)
                write_results(training, scores, monitor)
    except UserError as error:
        print(f"train.py: {_message(error)}", file=sys.stderr)
        return 2
    return 0


def _message(error: UserError) -> str:
    """Without the traceback that a loader's worker puts ahead of it."""
    return str(error).strip().rsplit(f"{type(error).__name__}: ", 1)[-1]


if __name__ == "__main__":
    sys.exit(main())
