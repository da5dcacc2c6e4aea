"""The choice of JAX's platform, made before JAX looks for devices."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

from dsv4_convert.cache import program_folder
from dsv4_convert.errors import UsageError, did_you_mean

#: Each platform as users write it: JAX's names for it, and the way to install it.
PLATFORMS: dict[str, tuple[tuple[str, ...], str]] = {
    "cpu": (("cpu",), "JAX itself: python -m pip install jax"),
    "gpu": (
        ("cuda", "rocm"),
        "a GPU, its driver, and JAX's plugin for it: python -m pip install 'jax[cuda13]' (or cuda12; AMD: rocm)",
    ),
    "tpu": (("tpu",), "a TPU of this machine, and JAX's plugin for it: python -m pip install 'jax[tpu]'"),
}


#: Bytes of compiled programs that are kept; the ones used longest ago go first.
_MOST_BYTES = 1 << 30


def select_platform(platform: str | None) -> None:
    """Let JAX use a platform of :data:`PLATFORMS` and no other; None leaves the choice to JAX.

    It has an effect only before JAX has looked for devices, which :func:`check_platform` does.

    Raises:
        UsageError: no such platform.
    """
    if platform is None:
        return
    if platform not in PLATFORMS:
        raise UsageError(
            f"--platform {platform}: expected one of {', '.join(PLATFORMS)}{did_you_mean(platform, PLATFORMS)}"
        )
    import jax

    jax.config.update("jax_platforms", PLATFORMS[platform][0][0])


def keep_programs() -> None:
    """Let JAX keep the programs that it compiles for the next run, in :func:`~dsv4_convert.cache.program_folder`.

    A user's own JAX_COMPILATION_CACHE_DIR stays as it is. A folder that cannot be written is left alone.
    """
    folder = program_folder()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A model has hundreds of small programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)


def check_platform(platform: str | None) -> None:
    """Start JAX on the platform that was selected; on what JAX prefers or JAX_PLATFORMS says for None.

    Raises:
        UsageError: JAX cannot start there; says why, and what it takes.
    """
    _check_flags(os.environ.get("XLA_FLAGS", ""))
    import jax

    if platform is None:
        if (reason := _cannot_start()) is not None:
            asked = os.environ.get("JAX_PLATFORMS")
            way_out = (
                f"JAX_PLATFORMS={asked} asks for it; unset it, or set --platform" if asked else "set --platform cpu"
            )
            raise UsageError(f"JAX cannot start ({reason}); {way_out}")
        return
    names, needs = PLATFORMS[platform]
    reasons = []
    for name in names:
        jax.config.update("jax_platforms", name)
        if (reason := _cannot_start()) is not None:
            reasons.append(reason or f"no {name} device")
            continue
        if (found := jax.default_backend()) == platform:
            return
        reasons.append(f"it is in use with {found}")
    raise UsageError(f"--platform {platform}: JAX finds no such device ({'; '.join(reasons)}). It takes {needs}")


#: Starts XLA by itself, in a third of the time that JAX takes.
_START = "from jaxlib import xla_client; xla_client.make_cpu_client()"


@functools.cache
def _check_flags(flags: str) -> None:
    """Raise :class:`UsageError` for a flag that XLA does not know: it would end the process without an exception."""
    if not flags:
        return
    said = subprocess.run([sys.executable, "-c", _START], capture_output=True, text=True, check=False).stderr
    if unknown := re.search(r"Unknown flags? in XLA_FLAGS: *(.*)", said):
        raise UsageError(f"XLA_FLAGS: this version of XLA has no {unknown[1]}; correct XLA_FLAGS or unset it")


def _cannot_start() -> str | None:
    """Why JAX has no backend; None where it has one."""
    import jax

    try:
        jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        # JAX says no more than an assertion where there is a plugin and no device.
        return str(error).split(" (set JAX_PLATFORMS")[0].splitlines()[0] if str(error) else ""
    return None
