"""The processes of ``jax.distributed``, as those that write a checkpoint together.

Relies on the public ``is_jax_distributed_client_initialized``, ``get_jax_distributed_client``, ``process_index`` and
``process_count`` of ``orbax.checkpoint.multihost``; JAX itself has no public way to its key-value store.
"""

from __future__ import annotations

import sys

from dsv4_convert.errors import ResourceError, UsageError
from dsv4_convert.store.processes import ALONE, Processes


def current_processes() -> Processes:
    """All processes that ``jax.distributed`` knows, seen from this one; this one alone where it is not initialised."""
    if "jax" not in sys.modules:
        return ALONE
    import orbax.checkpoint as ocp  # type: ignore[import-untyped]

    if not ocp.multihost.is_jax_distributed_client_initialized():
        return ALONE
    return Processes(
        index=ocp.multihost.process_index(),
        count=ocp.multihost.process_count(),
        service=ocp.multihost.get_jax_distributed_client(),
    )


def join(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> Processes:
    """Initialise ``jax.distributed`` and wait for the others.

    Args:
        coordinator: ``HOST:PORT`` of process 0; None, as the others, where JAX finds out by itself, as on a TPU slice.
        count: number of processes.
        index: number of this one, from 0.

    Raises:
        UsageError: JAX cannot find out.
        ResourceError: the others are not there in time.
    """
    import jax

    try:
        jax.distributed.initialize(coordinator_address=coordinator, num_processes=count, process_id=index)
    except ValueError as error:
        raise UsageError(
            f"JAX does not know the processes here ({error}); say where with --coordinator HOST:PORT, "
            "--num-processes and --process-id"
        ) from error
    except RuntimeError as error:
        raise ResourceError(f"cannot join the other processes: {error}") from error
    return current_processes()
