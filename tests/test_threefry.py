"""Random bits are JAX's own, to the last one, however they are drawn, and users are told when the fast code is off."""

import subprocess
import sys

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist import switches, threefry

ROUNDS = [rotation for group in range(5) for rotation in threefry.ROTATIONS[group % 2]]


def hashed(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """Threefry-2x32-20 by the paper, one round after another, in Python's integers."""
    word = 2**32
    keys = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = (counter[0] + keys[0]) % word, (counter[1] + keys[1]) % word
    for number, rotation in enumerate(ROUNDS, 1):
        x = (x + y) % word
        y = ((y << rotation | y >> 32 - rotation) % word) ^ x
        if number % 4 == 0:
            injection = number // 4
            x = (x + keys[injection % 3]) % word
            y = (y + keys[(injection + 1) % 3] + injection) % word
    return x, y


# The known answers of the authors' library (Random123, kat_vectors, threefry2x32 20).
@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers(key, counter, expected):
    assert hashed(key, counter) == expected
    words = [jnp.uint32(word) for word in (*key, *counter)]
    assert tuple(map(int, jax.jit(threefry.hash_pair)(*words))) == expected


@pytest.mark.parametrize("shape", [(), (1,), (5,), (8, 3), (4096,), (65, 67)])
def test_bits_are_those_of_the_paper_in_every_size(shape):
    """Drawn in a compiled program, where JAX lowers the primitive by what `register` gave it."""
    assert threefry.in_use() == "unrolled"
    key = jax.random.key(12345)
    low, high = (int(word) for word in jax.random.key_data(key))
    found = np.asarray(jax.jit(lambda key: jax.random.bits(key, shape))(jax.random.clone(key))).ravel()
    for place in {0, len(found) // 2, len(found) - 1}:
        x, y = hashed((low, high), (0, int(place)))
        assert found[place] == x ^ y


def test_programs_have_no_loop_of_rounds():
    """JAX's own lowering has a loop: with it this fails."""
    text = jax.jit(lambda key: jax.random.bits(key, (64,))).lower(jax.random.key(0)).as_text()
    assert "while" not in text


def test_splits_and_lanes_are_those_without_compiling_ours():
    script = (
        "import jax, numpy as np, sys\n"
        "if sys.argv[1] == 'ours': from jaxrl_dist import agent\n"
        "keys = jax.random.split(jax.random.fold_in(jax.random.key(3), 9), 7)\n"
        "lanes = jax.jit(jax.vmap(lambda key: jax.random.bits(key, (6,))))(keys)\n"
        "print(np.asarray(jax.random.key_data(keys)).tolist(), np.asarray(lanes).tolist())\n"
    )
    ours, theirs = (
        subprocess.run([sys.executable, "-c", script, who], capture_output=True, text=True, check=True).stdout
        for who in ("ours", "theirs")
    )
    assert ours == theirs
    assert len(ours) > 100


def test_switch_leaves_jax_alone_and_is_recorded(monkeypatch):
    assert switches.recorded()["threefry"] == "unrolled"
    monkeypatch.setenv(threefry.SWITCH, "jax")
    assert switches.recorded()["threefry"] == "jax"
    monkeypatch.setattr(threefry.mlir, "register_lowering", lambda *_, **__: pytest.fail("registered"))
    assert threefry.register() == "jax"
    monkeypatch.setenv(threefry.SWITCH, "rolled")
    with pytest.raises(ValueError, match=r"JAXRL_DIST_THREEFRY is 'rolled'; it must be jax, or not be set"):
        threefry.register()


def test_unknown_release_is_left_alone_and_said(monkeypatch):
    monkeypatch.setattr(threefry, "KNOWN", ("0.1.",))
    monkeypatch.setattr(threefry.mlir, "register_lowering", lambda *_, **__: pytest.fail("registered"))
    with pytest.warns(UserWarning, match=rf"JAX {jax.__version__} is not known here; random numbers"):
        assert threefry.register() == "jax"
