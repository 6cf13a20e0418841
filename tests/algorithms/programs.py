"""Two compiled programs per agent that serve all shared checks: `begin` makes states, `advance` trains them.

Both run over lanes side by side: the cases of the probes, one configuration whose floats are all alive, the same once
more, the same from another key, and one lane for each float, changed. Compiling is most of what tests cost, so whatever
can be asked of these lanes is asked of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import by_hand
import cases
import jax
import jax.numpy as jnp
from cases import World

from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.distributional import law
from jaxrl_dist.envs.probe import CASES

LIVELY = CASES.index("final_observation")
"""The probe of the lanes that are compared with each other: its targets bootstrap."""


class Programs(NamedTuple):
    """What is compiled, and what it runs on; every array has a leading axis of lanes."""

    config: Any
    """of the lively lanes"""
    floats: list[str]
    configs: Any
    case: jax.Array
    base: int
    """the lively lane; the next is its copy, and the next has another key"""
    begin: Callable
    """() -> state"""
    advance: Callable
    """(state, iterations, configs=configs) -> state, metrics summed, what the agent does and predicts"""
    agent: Callable
    """lane -> the agent of a lane, not compiled"""

    def lane(self, name: str) -> int:
        """The lane of a changed float."""
        return self.base + 3 + self.floats.index(name)


def float_fields(config) -> list[str]:
    return [field.name for field in dataclasses.fields(config) if isinstance(getattr(config, field.name), float)]


def build(name: str, world: World | None = None, only_cases: tuple[str, ...] = CASES, **settings) -> Programs:
    """Compile nothing yet; `only_cases` and `settings` are for faults that must be found."""
    row, module = cases.row(name), cases.module(name)
    world = world or row.world
    config = dataclasses.replace(module.Config(), **(row.small | settings))
    quiet = dataclasses.replace(config, **row.quiet)
    floats = float_fields(config)
    changed = [dataclasses.replace(config, **{name: getattr(config, name) * 0.4 + 0.01}) for name in floats]
    lanes = [quiet] * len(only_cases) + [config] * 3 + changed
    for lane in lanes:
        check_configuration(lane)
    configs = jax.tree.map(lambda *values: jnp.array(values), *lanes)
    base = len(only_cases)
    case = jnp.array([*map(CASES.index, only_cases)] + [LIVELY] * (len(lanes) - base))
    seeds = jnp.full(len(lanes), 1).at[base + 2].set(2)

    def agent_of(config, case):
        data = (row.data(world, case),) if row.data else ()
        return module.make_agent(config, world.env, world.params(config, case), *data)

    def looks(agent, state):
        """The greedy action at every look, and the mean of the law there: of this action, or of each that there is."""
        key, memory = jax.random.key(0), agent.policy.start(len(world.observation))
        action = agent.policy.act(state, world.observation, memory, key)[0]
        if not agent.claim:
            return {"action": action}
        taken = [action]
        if world.num_actions and not agent.claim.of_states:
            taken = [jnp.full_like(action, one) for one in range(world.num_actions)]
        values = jnp.stack([law.mean(agent.claim.law(state, world.observation, one)) for one in taken])
        return {"action": action, "value": values}

    def begin(config, case, seed):
        return agent_of(config, case).init(jax.random.key(seed))

    def advance(state, config, case, iterations):
        agent = agent_of(config, case)
        metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(agent.step, state)[1])

        def once(_, carry):
            state, total = carry
            state, metrics = agent.step(state)
            return state, jax.tree.map(jnp.add, total, metrics)

        state, metrics = jax.lax.fori_loop(0, iterations, once, (state, metrics))
        return state, metrics, looks(agent, state)

    begin = by_hand.quick(jax.vmap(begin))
    advance = by_hand.quick(jax.vmap(advance, in_axes=(0, 0, 0, None)))

    def train(state, iterations, configs=configs):
        return advance(by_hand.with_fresh_keys(state), configs, case, jnp.int32(iterations))

    def one_agent(lane):
        return agent_of(lanes[lane], case[lane])

    return Programs(config, floats, configs, case, base, lambda: begin(configs, case, seeds), train, one_agent)


@functools.lru_cache(maxsize=2)
def of(name: str) -> Programs:
    """The programs of an agent; the tests of one agent follow each other."""
    return build(name)


def parts(name: str, state) -> dict[str, Any]:
    """What an iteration changes, by name."""
    lived = {"interaction": state.interaction} if hasattr(state, "interaction") else {}
    lived = {"replay": state.experience.replay.rows} if cases.row(name).replay else lived
    found = by_hand.parts(state.learner) | lived
    return cases.row(name).more_parts(state, found)


def differing(name: str, state, one: int, other: int) -> set[str]:
    """The parts in which two lanes differ."""
    return {
        part for part, tree in parts(name, state).items()
        if any((leaf[one] != leaf[other]).any() for leaf in jax.tree.leaves(tree))
    }  # fmt: skip
