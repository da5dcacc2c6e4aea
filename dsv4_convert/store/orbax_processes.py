"""The processes of ``jax.distributed``, as those that write a checkpoint together.

Relies on the public ``is_jax_distributed_client_initialized``, ``get_jax_distributed_client``, ``process_index`` and
``process_count`` of ``orbax.checkpoint.multihost``; JAX itself has no public way to its key-value store.
"""

from __future__ import annotations

import sys

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


def join(coordinator: str, count: int, index: int) -> Processes:
    """Initialise ``jax.distributed`` and wait for the others.

    Args:
        coordinator: ``HOST:PORT`` of process 0.
        count: number of processes.
        index: number of this one, from 0.
    """
    import jax

    jax.distributed.initialize(coordinator_address=coordinator, num_processes=count, process_id=index)
    return current_processes()
