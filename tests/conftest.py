"""Settings of every test."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import settings

from . import shapes as shapes  # pyproject.toml names its type checker
from .checkpoint.hub_server import LoopbackHub, serving

# The packages are the installed ones; benchmarks, of which tests take parts, are not installed.
sys.path.append(str(Path(__file__).parents[1]))

# No deadline: the first example of a test may compile a program. Derandomised, so that CI says the same every time.
settings.register_profile("dsv4", deadline=None, derandomize=True)
settings.load_profile("dsv4")

# transformers must neither look for a hub nor draw progress bars into the test output.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests leave the user's cache alone; programs has one of their own.
os.environ.setdefault("DSV4_CACHE", "off")

# The threads of BLAS and OpenMP wait for one another by spinning: with tests side by side, and on arrays as small as
# these, that takes several times what the work does.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


# Python's collector mostly looks at modules and at what JAX remembers, which stay. With its default limits it takes up
# to a tenth of the time of a test.
gc.set_threshold(50_000, 20, 20)


def pytest_collection_finish() -> None:
    """The imported modules and the tests stay until the end: the collector need not look at them again."""
    if "jax" in sys.modules:
        _reuse_contexts()
    gc.collect()
    gc.freeze()


#: Programs that are lowered in one MLIR context, which keeps their types and constants.
_PROGRAMS_OF_A_CONTEXT = 50


def _reuse_contexts() -> None:
    """Have JAX lower several programs in one MLIR context, as its newest release does by itself.

    Making one takes a quarter of the time of a program with a single operation.
    """
    from jax._src.interpreters import mlir

    if hasattr(mlir, "_create_ir_context"):
        return
    make, count = mlir.make_ir_context, itertools.count()
    made = lru_cache(maxsize=4)(lambda thread, number: make())
    mlir.make_ir_context = lambda: made(threading.get_ident(), next(count) // _PROGRAMS_OF_A_CONTEXT)


def pytest_configure(config: pytest.Config) -> None:
    """Give all workers, and the processes that tests start, one folder of compiled programs.

    XLA compiles each program once, whichever module or process needs it first. The folder is that of this session,
    unless another one is given, such as nox's, where the next run finds them.
    """
    # Most programs are small and quickly compiled, but there are thousands.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="dsv4-programs-")
    config.add_cleanup(folder.cleanup)
    config.add_cleanup(lambda: os.environ.pop("JAX_COMPILATION_CACHE_DIR"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name


#: Regions of memory of a process from which its compiled programs are dropped. Linux allows 65,530, XLA takes several
#: for each program, and ends the process when it gets none.
_MOST_REGIONS = 30_000


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Drops the compiled programs of earlier modules before they are too many for the system."""
    yield
    regions = Path("/proc/self/maps")
    if "jax" in sys.modules and regions.exists() and regions.read_bytes().count(b"\n") > _MOST_REGIONS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A loopback Hub that the Hub client of this process talks to."""
    with serving(tmp_path) as server:
        yield server


@pytest.fixture
def bucket() -> Iterator[dict[str, object]]:
    """``gs://`` URLs lead to an empty file system in memory; its files by path."""
    import fsspec

    from .memory_bucket import MemoryBucket

    for name in MemoryBucket.protocol:
        fsspec.register_implementation(name, MemoryBucket, clobber=True)
    MemoryBucket.store.clear()
    yield MemoryBucket.store
    MemoryBucket.store.clear()
