"""JAX's random bits on a CPU, several times faster: the same hash without its loop.

JAX compiles Threefry-2x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) for CPUs as a loop of
small kernels, which is quick to compile and slow to run: 20 rounds that each start a kernel cost 1 us where the numbers
themselves cost 0.05. Written out, the rounds fuse into one kernel and into what uses the bits: 1 to 8 words take a
twentieth of the time, 256 to 65,536 a fifth. Bits are the same for every key, so splits, integers and masks are, too;
floats made of them may round differently in the last place, because other operations are fused with them.

`register` replaces the rule by which JAX lowers the primitive on CPUs, through the interfaces that JAX has for that. It
runs when `jaxrl_dist.agent` is imported. Accelerators keep JAX's own. JAXRL_DIST_THREEFRY=jax leaves CPUs alone, too.
"""

import os
import warnings

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import mlir

SWITCH = "JAXRL_DIST_THREEFRY"
KNOWN = ("0.10.",)
"""releases of JAX whose primitive is the one that `hash_pair` computes; tests hold the bits against JAX's"""

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def hash_pair(key1: jax.Array, key2: jax.Array, x1: jax.Array, x2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds: two words of a key and two of a counter to two words, uint32 that broadcast."""
    keys = (key1, key2, key1 ^ key2 ^ jnp.uint32(0x1BD11BDA))
    x1, x2 = x1 + keys[0], x2 + keys[1]
    for group in range(5):
        for distance in ROTATIONS[group % 2]:
            x1 = x1 + x2
            x2 = x1 ^ ((x2 << jnp.uint32(distance)) | (x2 >> jnp.uint32(32 - distance)))
        x1 = x1 + keys[(group + 1) % 3]
        x2 = x2 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x1, x2


def register() -> str:
    """Have programs that are compiled from now on draw by `hash_pair` on CPUs; returns `in_use()`.

    Says so once where it cannot: with a release of JAX that nobody has tried.
    """
    if in_use() == "unrolled":
        primitive = jax.extend.core.primitives.threefry2x32_p
        mlir.register_lowering(primitive, mlir.lower_fun(hash_pair, multiple_results=True), platform="cpu")
    elif not os.environ.get(SWITCH):
        warnings.warn(f"JAX {jax.__version__} is not known here; random numbers on a CPU are slower", stacklevel=2)
    return in_use()


def in_use() -> str:
    """Which code draws random bits on CPUs: "unrolled", or "jax" where the switch says so or JAX is not known."""
    asked = os.environ.get(SWITCH, "")
    if asked not in ("", "jax"):
        raise ValueError(f"{SWITCH} is {asked!r}; it must be jax, or not be set")
    return "jax" if asked or not jax.__version__.startswith(KNOWN) else "unrolled"
