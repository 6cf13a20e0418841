"""What holds in every test: the CPU, an error wherever a random key is used twice, and programs compiled only once."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported, and inherited by the processes that tests start
# Most of the suite's time is compiling, and many tests compile the same programs. The processes of pytest-xdist and
# those that tests start inherit the folder; it goes when the first process ends.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="jaxrl_dist-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax

# A pytest plug-in may have imported jax before this file.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
# Sees typed keys only, in jit, scan and vmap. gymnax 1.0.1 (its 25 environments that need no download) and the
# resets of brax 0.14.2 were checked under it and reuse none, so there is no switch to turn it off.
jax.config.update("jax_debug_key_reuse", True)
