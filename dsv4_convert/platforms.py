"""Which of JAX's platforms computes: chosen before JAX has looked for devices."""

from __future__ import annotations

from dsv4_convert.errors import UsageError, did_you_mean

#: What a user may say, what JAX calls it, and what makes JAX find it.
PLATFORMS: dict[str, tuple[tuple[str, ...], str]] = {
    "cpu": (("cpu",), "JAX itself: python -m pip install jax"),
    "gpu": (
        ("cuda", "rocm"),
        "a GPU, its driver, and JAX's plugin for it: python -m pip install 'jax[cuda13]' (or cuda12; AMD: rocm)",
    ),
    "tpu": (("tpu",), "a TPU of this machine, and JAX's plugin for it: python -m pip install 'jax[tpu]'"),
}


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


def check_platform(platform: str | None) -> None:
    """Look for the devices of the platform that was selected.

    Raises:
        UsageError: there are none, with what it takes.
    """
    if platform is None:
        return
    import jax

    names, needs = PLATFORMS[platform]
    reasons = []
    for name in names:
        jax.config.update("jax_platforms", name)
        try:
            found = jax.default_backend()
        except (RuntimeError, AssertionError) as error:
            # An assertion is all that JAX has to say where there is a plugin and no device.
            reasons.append(str(error).split(" (set JAX_PLATFORMS")[0] or f"no {name} device")
            continue
        if found == platform:
            return
        reasons.append(f"it is in use with {found}")
    raise UsageError(f"--platform {platform}: JAX finds no such device ({'; '.join(reasons)}). It takes {needs}")
