"""The floor of an update: its matrix products and nothing else.

Which products, and of which shapes, is read from the agent's own trace, so that there is one floor for every agent and
none that is written by hand. They run one after another in a loop: a number out of each goes into the next, which keeps
the compiler from leaving out, merging or moving any of them, and costs nothing beside a product.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr


class Product(NamedTuple):
    """One `dot_general`: the shapes of its two sides, what it does with their axes, and how often it is done."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    axes: Any
    times: int

    @property
    def operations(self) -> int:
        """Multiplications and additions of all times."""
        (contracted, _), _ = self.axes
        out = jax.eval_shape(self.of, *(jax.ShapeDtypeStruct(side, jnp.float32) for side in (self.left, self.right)))
        depth = 1
        for axis in contracted:
            depth *= self.left[axis]
        return 2 * out.size * depth * self.times

    def of(self, left: jax.Array, right: jax.Array) -> jax.Array:
        return jax.lax.dot_general(left, right, self.axes)


def products(jaxpr: Jaxpr, times: int = 1) -> Iterator[Product]:
    """All products of a trace, those inside of scans as often as the scan turns; of a `cond` those of each branch."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, right = (operand.aval.shape for operand in equation.invars)
            yield Product(left, right, equation.params["dimension_numbers"], times)
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(parameter, ClosedJaxpr | Jaxpr):
                yield from products(getattr(parameter, "jaxpr", parameter), times * turns)


def products_of(function: Callable, *arguments: Any) -> list[Product]:
    """The products of one call."""
    return list(products(jax.make_jaxpr(function)(*arguments).jaxpr))


def loop_of(needed: list[Product]) -> Callable[[int], jax.Array]:
    """`loop(n)` does the products n times, one after another; compiled at its first call."""
    keys = jax.random.split(jax.random.key(0), 2 * len(needed))
    lefts = tuple(jax.random.normal(key, product.left) for key, product in zip(keys, needed, strict=False))
    rights = tuple(
        jax.random.normal(key, product.right) for key, product in zip(keys[len(needed) :], needed, strict=True)
    )

    def once(_, carry):
        lefts, number = carry
        following = []
        for left, right, product in zip(lefts, rights, needed, strict=True):

            def one(_, carry, right=right, product=product):
                left, number = carry
                left = left.at[(0,) * left.ndim].set(number)
                # Without the barrier, XLA would compute the one number that is taken from the product.
                out = jax.lax.optimization_barrier(product.of(left, right))
                return left, out[(0,) * out.ndim] * 1e-6

            if product.times == 1:
                left, number = one(0, (left, number))
            else:
                left, number = jax.lax.fori_loop(0, product.times, one, (left, number))
            following.append(left)
        return tuple(following), number

    return jax.jit(lambda times: jax.lax.fori_loop(0, times, once, (lefts, jnp.float32(1)))[1])


def program(needed: list[Product]) -> Callable[[int], None]:
    """`run(n)` does the products n times, and waits for them."""
    loop = loop_of(needed)

    def run(times: int) -> None:
        jax.block_until_ready(loop(times))

    return run
