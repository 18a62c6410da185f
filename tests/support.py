"""``python tests/support.py``: writes the tables of docs/support.md from the tests that there are.

Which tests show what is said here, once; what dtypes and implementations they run with, and whether they need a GPU, is
read from pytest's collection of them. A test that was renamed or lost its parameters leaves a cell empty or is an
error, and ``test_readme.py`` fails until this was run again. Only a recorded campaign on a GPU (``make gpu``) turns
"written" into "tested".
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"
DTYPES = ("float32", "float64", "bfloat16", "float16")
TESTED, INTERPRETED, WRITTEN, FAILED = "tested", "interpreted", "written", "FAILED"
INCOMPLETE = 3

CPP, PLAIN, TRITON, CUDA_CPP = "CPU, C++", "CPU, plain PyTorch", "CUDA, Triton", "CUDA, C++"
BACKENDS = {CPP: "native", PLAIN: "reference"}
NATIVE_ATTENTION = "test_asymmetric_attention_native.py::test_accuracy_of_map_layouts"
POOL, BATCH_NORM = "test_pyramid_pool.py", "test_batch_norm.py::test_accuracy_of_layouts"
TRITON_POOL = "interpreter/test_pyramid_pool_triton.py"
TRITON_ATTENTION = "interpreter/test_asymmetric_attention_triton.py"
TRITON_BATCH_NORM = "interpreter/test_batch_norm_triton.py::test_accuracy_of_layouts"

OPERATORS = {
    "`pyramid_pool`": {
        CPP: f"{POOL}::test_accuracy_of_layouts",
        PLAIN: f"{POOL}::test_accuracy_of_layouts",
        TRITON: f"{TRITON_POOL}::test_accuracy_of_views",
        CUDA_CPP: "test_pyramid_pool_cuda.py::test_accuracy_of_layouts",
    },
    "`asymmetric_attention`": {
        CPP: NATIVE_ATTENTION,
        PLAIN: "test_asymmetric_attention.py::test_accuracy_of_the_reference",
        TRITON: f"{TRITON_ATTENTION}::test_accuracy_of_map_layouts",
    },
    "pooling of batch norm and ReLU": {
        CPP: f"{POOL}::test_accuracy_of_rectified_layouts",
        PLAIN: f"{POOL}::test_accuracy_of_rectified_layouts",
        TRITON: f"{TRITON_POOL}::test_accuracy_of_rectified_layouts",
    },
    "attention on batch norm and ReLU": {
        CPP: "test_asymmetric_attention.py::test_norm_skip_and_constant",
        PLAIN: "test_asymmetric_attention.py::test_norm_skip_and_constant",
        TRITON: f"{TRITON_ATTENTION}::test_norm_skip_and_constant",
    },
    "batch norm of the tail": {CPP: BATCH_NORM, PLAIN: BATCH_NORM, TRITON: TRITON_BATCH_NORM},
}
"""Every test here is of the forward and the backward pass, in several layouts, against float64."""

MODULES, DISTRIBUTED = "test_modules.py", "test_distributed.py::test_two_processes_equal_one"
FEATURES = {
    "training and evaluation, every norm and setting": ["test_blocks.py::test_collapse_is_exact"],
    "16 bits and autocast": ["test_blocks.py::test_as_accurate_as_plain"],
    "`torch.compile`, one graph for all sizes": [
        "test_blocks.py::test_compiles_as_one_graph_for_every_size",
        f"{POOL}::test_compiles_whole",
        "test_asymmetric_attention.py::test_compiles_whole",
    ],
    "`torch.compile`: ten sizes, one compilation; `reduce-overhead`": [
        "test_compile.py::test_one_compilation_serves_every_size",
        "test_compile.py::test_cuda_graphs_of_inductor",
    ],
    "`torch.library.opcheck` of every operator": ["test_every_operator.py::test_opcheck"],
    "`torch.export` with free sizes": ["test_export.py::test_a_new_process_runs_it_at_other_sizes"],
    "AOTInductor with free sizes": ["test_aoti.py::test_a_new_process_that_imports_this_package_runs_it"],
    "ONNX with free sizes": ["test_onnx.py::test_every_size_runs_from_one_graph"],
    "`gradcheck`; second derivatives of the pooling": [
        f"{POOL}::test_derivatives_of_first_and_second_order",
        "test_asymmetric_attention.py::test_gradcheck",
    ],
    "`torch.func.grad` and `vmap` over operators": [
        f"{POOL}::test_functional_transforms",
        "test_asymmetric_attention.py::test_functional_transforms",
    ],
    "`torch.func.functional_call` under `grad` over blocks": ["test_autograd.py::test_functional_call_under_grad"],
    "activation checkpointing, both modes": ["test_autograd.py::test_activation_checkpointing"],
    "inference mode, saved-tensor hooks": [
        "test_autograd.py::test_inference_mode",
        "test_autograd.py::test_saved_tensors_may_be_kept_elsewhere",
    ],
    "`GradScaler`, autocast": ["test_amp.py::test_a_scaled_step_is_as_accurate_as_plain"],
    "streams, other devices, CUDA graphs": [
        "test_cuda.py::test_another_stream",
        "test_cuda.py::test_a_device_that_is_not_the_current_one",
        "test_cuda.py::test_a_training_step_in_a_cuda_graph",
    ],
    "deterministic mode": ["test_cuda.py::test_deterministic_mode_gives_the_same_bits"],
    "DDP, FSDP2, SyncBatchNorm": [DISTRIBUTED],
    "row shards of one map": ["test_parallel.py::test_row_shards_train_as_the_unsplit_block"],
    "`deepcopy`, `pickle`, `torch.save`": [f"{MODULES}::test_a_copy_is_a_block_of_its_own"],
    "`state_dict`, strict": [f"{MODULES}::test_the_state_dict_makes_the_round_trip_strictly"],
    "`.to` dtype, device, memory format": [
        f"{MODULES}::test_the_dtype_moves",
        f"{MODULES}::test_the_device_moves_and_comes_back",
        f"{MODULES}::test_the_memory_format_is_kept",
    ],
    "hooks, parametrizations, frozen parameters": [
        f"{MODULES}::test_hooks_of_the_block_see_and_change_what_passes",
        f"{MODULES}::test_parametrizations_are_honoured",
        f"{MODULES}::test_a_frozen_block_passes_gradients_on_and_takes_none",
    ],
    "`fold_for_inference`": ["test_folding.py::test_a_folded_block_equals_the_unfolded"],
}


class Collected(NamedTuple):
    """One test, with one set of parameters."""

    test: str
    dtype: str | None
    backend: str | None
    gpu: bool
    node: str


class _Collection:
    """What pytest finds; files that skip themselves make it incomplete."""

    def __init__(self) -> None:
        self.found: list[Collected] = []
        self.skipped: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped.append(f"{report.nodeid}: {report.longrepr[2]}")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            test = str(item.path.relative_to(ROOT / "tests")) + "::" + item.originalname
            gpu = item.get_closest_marker("gpu") is not None or test.startswith("interpreter/")
            dtype = str(parameters.get("dtype")).removeprefix("torch.")
            here = gpu and not interpreting()
            self.found.append(Collected(test, dtype, parameters.get("backend"), here, item.nodeid))


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def named_tests() -> list[str]:
    """All that the tables name."""
    operators = [test for row in OPERATORS.values() for test in row.values()]
    return operators + [test for tests in FEATURES.values() for test in tests]


def collect() -> None:
    """Print what pytest finds of them, as JSON; under TRITON_INTERPRET=1 the kernels' tests alone."""
    files = {test.partition("::")[0] for test in named_tests()}
    files = {file for file in files if file.startswith("interpreter/") or not interpreting()}
    collection = _Collection()
    paths = [str(ROOT / "tests" / file) for file in sorted(files)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = pytest.main(["--collect-only", "-qqq", "-p", "no:cacheprovider", *paths], plugins=[collection])
    if code != pytest.ExitCode.OK:
        raise SystemExit(printed.getvalue())
    if collection.skipped:
        print("\n".join(collection.skipped), file=sys.stderr)
        raise SystemExit(INCOMPLETE)
    print(json.dumps(collection.found))


def collected(**environment: str) -> set[Collected]:
    """What :func:`collect` prints in a process of its own: Triton's interpreter is chosen when kernels are imported."""
    command = [sys.executable, __file__, "--collect"]
    variables = os.environ | environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return {Collected(*entry) for entry in json.loads(done.stdout)}


class OnGpu(NamedTuple):
    """What recorded campaigns say: which tests passed and failed, by pytest's names, and on which devices."""

    passed: frozenset[str]
    failed: frozenset[str]
    devices: tuple[str, ...]

    def cell(self, tests: set[str]) -> str:
        """Of a table, for tests by node id with their parameters: one that failed is said before all that passed."""
        if tests & self.failed:
            return FAILED
        return TESTED if tests & self.passed else WRITTEN


def recorded_on_gpus(results: Path = ROOT / "benchmarks" / "results") -> OnGpu:
    """The outcomes of GPU tests in all records; a test that failed anywhere counts as failed."""
    passed, failed, devices = set(), set(), []
    for file in sorted(results.glob("*/benchmark.json")):
        tests = json.loads(file.read_text()).get("tests", {})
        passed |= {name for name, outcome in tests.items() if outcome["outcome"] == "passed"}
        failed |= {name for name, outcome in tests.items() if outcome["outcome"] == "failed"}
        if tests:
            devices.append(file.parent.name)
    return OnGpu(frozenset(passed - failed), frozenset(failed), tuple(devices))


def operator_rows(here: set[Collected], interpreted: set[Collected], on_gpu: OnGpu) -> Iterator[list[str]]:
    """Operator, implementation, and one cell per dtype."""
    for operator, tests in OPERATORS.items():
        for implementation, test in tests.items():
            backend = BACKENDS.get(implementation)
            cells = []
            for dtype in DTYPES:
                found = [c for c in here if c.test == test and c.dtype == dtype and c.backend in (None, backend)]
                on_device = {c.node for c in found if c.gpu}
                cell = (on_gpu.cell(on_device) if on_device else TESTED) if found else ""
                if cell == WRITTEN and any(c.test == test and c.dtype == dtype for c in interpreted):
                    cell = INTERPRETED
                cells.append(cell)
            yield [operator, implementation, *cells]


def feature_rows(here: set[Collected], on_gpu: OnGpu) -> Iterator[list[str]]:
    """Feature, CPU, CUDA."""
    for feature, tests in FEATURES.items():
        on_device = {c.node for c in here if c.test in tests and c.gpu}
        elsewhere = any(c.test in tests and not c.gpu for c in here)
        yield [feature, TESTED if elsewhere else "", on_gpu.cell(on_device) if on_device else ""]


def table(*rows: list[str]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def generate(page: str) -> str:
    """The page with its tables written anew."""
    here, interpreted = collected(TRITON_INTERPRET="0"), collected(TRITON_INTERPRET="1")
    missing = set(named_tests()) - {c.test for c in here}
    if missing:
        raise SystemExit(f"tests/support.py names tests that are not there: {', '.join(sorted(missing))}")
    on_gpu = recorded_on_gpus()
    before, _, rest = page.partition(BEGIN)
    lines = [
        BEGIN,
        table(["forward and backward", "where", *DTYPES], *operator_rows(here, interpreted, on_gpu)),
        table(["blocks and operators with", "CPU", "CUDA"], *feature_rows(here, on_gpu)),
        f"GPU tests ran on: {', '.join(on_gpu.devices) or 'no GPU yet'}.",
        END,
    ]
    return before + "\n\n".join(lines) + rest.partition(END)[2]


def main(option: str | None) -> None:
    """Write the tables; with ``--check``, fail where they are others."""
    if option == "--collect":
        collect()
        return
    path = ROOT / "docs" / "support.md"
    page = path.read_text()
    new = generate(page)
    if option != "--check":
        path.write_text(new)
    elif new != page:
        raise SystemExit("the tables of docs/support.md are not those of the tests: python tests/support.py")


if __name__ == "__main__":
    main(*(sys.argv[1:] or [None]))
