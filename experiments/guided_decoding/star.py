"""Can a small network learn which arm of a star leads to the goal? With look-ups taught first, and without.

A reference imitates solutions of star graphs (`envs/tokens.py`): it learns everything but the one hop that decides, and
is right in one of `arms`. Whether Q# mends that hangs on its value network: behind the start it has to find the goal
among the edges and what stands before it. From scratch that is not learned at this size from thousands of updates, for
there is one bit of it in every sequence. So the trunk of the value network is taught to look up first, in prompts of
edges u v between any nodes. At first all sequences have pairs v u of them behind the prompt, with a loss on every u;
then half of them end like the prompt of a star, with v as the goal, and have a loss on u behind v and behind each of
the two tokens that follow. (Both from the start: nothing was learned in 1,000 updates.) The number of edges that differ
is drawn from 1 to all of them, so that there is something to be learned before all of it is. No sequence shows a star,
and none what is right in one.

`star.csv` has a row per seed, per side of the comparison (look-ups taught or not) and time: in the phase `look-ups` the
share of those among all edges that are right, in the phase `law` the loss of the law, the share of guided completions
that are right, with eta 0.1, and that of the reference.

    python experiments/guided_decoding/star.py
"""

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pandas as pd
import tyro

from jaxrl_dist.algorithms.sequences import q_sharp
from jaxrl_dist.envs.tokens import StarGraph
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.transformer import Transformer
from jaxrl_dist.records import recording
from jaxrl_dist.running import evaluation

HERE = Path(__file__).parent


def look_ups(
    key: jax.Array, env: StarGraph, share: float | jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One sequence, with probability `share` of the second kind: tokens `[n]`, what is to be predicted behind each and
    where `[n]`, and how many edges differ."""
    nodes_key, count_key, order_key, pairs_key, kind_key = jax.random.split(key, 5)
    ends = jax.random.permutation(nodes_key, env.nodes)[: 2 * env.edges].reshape(env.edges, 2)
    count = jax.random.randint(count_key, (), 1, env.edges + 1)
    edges = ends[jax.random.permutation(order_key, jnp.arange(env.edges) % count)]
    prompt = jnp.concatenate([edges, jnp.full((env.edges, 1), env.nodes)], axis=1).ravel()
    first, behind = prompt.size, 3 + env.length

    # Pairs v u of edges u v: u behind every v.
    asked = edges[jax.random.permutation(pairs_key, env.edges)][:, ::-1]
    pairs = jnp.tile(asked.ravel(), 2)[:behind]
    at_pairs = jnp.arange(behind) % 2 == 0
    # As a prompt ends: any node as the start, v as the goal, `=`, the start: u behind each from v on.
    (v, u), start = asked[0], ends[0, 0]
    star = jnp.stack([start, v, env.nodes + 2, start, *[u] * (behind - 4)])
    at_star = (jnp.arange(behind) >= 1) & (jnp.arange(behind) <= 3)

    is_star = jax.random.bernoulli(kind_key, share)
    tokens = jnp.append(prompt, jnp.where(is_star, star, pairs))
    wanted = jnp.where(is_star, u, jnp.roll(tokens, -1))
    where = jnp.append(jnp.zeros(first, bool), jnp.where(is_star, at_star, at_pairs))
    return tokens, wanted, where.at[-1].set(False), count


def teacher(network: Transformer, env: StarGraph, rate: float, batch: int):
    """`teach(trained, keys, share) -> trained, share of look-ups among all edges that are right`; and an optimiser."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def update(trained: Trained, key: jax.Array, share: jax.Array):
        keys = jax.random.split(key, batch)
        tokens, wanted, where, count = jax.vmap(lambda key: look_ups(key, env, share))(keys)

        def objective(parameters):
            logits = network.apply(parameters, tokens)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
            full = where & (count == env.edges)[:, None]
            return (each * where).sum() / where.sum(), ((logits.argmax(-1) == wanted) & full).sum() / full.sum()

        trained, (_, right, _) = descend(optimizer, trained, objective)
        return trained, right

    @jax.jit
    def teach(trained, keys, share):
        trained, right = jax.lax.scan(lambda trained, key: update(trained, key, share), trained, keys)
        return trained, right[-50:].mean()

    return teach, optimizer


def law_rows(agent, env: StarGraph, state, key: jax.Array, updates: int, every: int) -> list[dict]:
    """Learn the law, and say every so often how far it is."""
    params = env.default_params

    @jax.jit
    def advance(state):
        def one(state, _):
            state, metrics = agent.step(state)
            return state, [metrics[name].total / metrics[name].count for name in ("loss", "target")]

        state, (loss, reward) = jax.lax.scan(one, state, length=every)
        return state, loss[-20:].mean(), reward.mean()

    @jax.jit
    def judge(state, key):
        return evaluation.evaluate(
            agent, env, params, state, key, episodes=2_000, max_steps=env.length
        ).episode_return.mean()

    rows = [{"updates": 0, "guided": float(judge(state, jax.random.fold_in(key, 0)))}]
    for done in range(every, updates + 1, every):
        state, loss, reward = advance(state)
        guided = float(judge(state, jax.random.fold_in(key, done)))
        rows.append({"updates": done, "loss": float(loss), "guided": guided, "reference": float(reward)})
        print(rows[-1], flush=True)
    return rows


def main(
    num_seeds: int = 3, arms: int = 2, length: int = 3, nodes: int = 10, pretraining: int = 600, teaching: int = 1_200,
    updates: int = 240, out: Path = HERE,
) -> None:  # fmt: skip
    """Train references, teach look-ups, learn laws with and without, write the table.

    Args:
        num_seeds: seeds, one after another.
        arms: of every star.
        length: of every arm, the start included.
        nodes: names for nodes.
        pretraining: updates of the reference.
        teaching: updates on look-ups, half of them on pairs alone.
        updates: updates of the law.
        out: folder to write to.
    """
    started, rows = time.perf_counter(), []
    out.mkdir(parents=True, exist_ok=True)
    env = StarGraph(arms, length, nodes)
    config = dataclasses.replace(q_sharp.Config(), pretraining=pretraining, pretraining_learning_rate=1e-3)
    agent = q_sharp.make_agent(config, env, env.default_params)
    pretrain = jax.jit(
        lambda state: jax.lax.fori_loop(0, pretraining, lambda _, state: agent.pretrain(state)[0], state)
    )
    network = Transformer(
        env.num_actions, env.num_actions, env.prompt_length + env.completion_length, config.width, config.num_blocks,
        config.num_heads,
    )  # fmt: skip
    teach, optimizer = teacher(network, env, rate=2e-3, batch=256)
    for seed in range(num_seeds):
        keys = jax.random.split(jax.random.key(seed), 5)
        state = jax.block_until_ready(pretrain(jax.jit(agent.init)(keys[0])))
        trained = begin(optimizer, network.init(keys[1], jnp.zeros((1, 1), jnp.int32)))
        for done in range(100, teaching + 1, 100):
            share = jnp.float32(0.0 if done <= teaching // 2 else 0.5)
            trained, right = teach(trained, jax.random.split(jax.random.fold_in(keys[2], done), 100), share)
            rows.append({"seed": seed, "taught": True, "phase": "look-ups", "updates": done, "right": float(right)})
            print(rows[-1], flush=True)
        own = state.learner.value
        trunk = trained.parameters["params"] | {"head_kernel": own.parameters["params"]["head_kernel"]}
        for taught in (True, False):
            value = own._replace(parameters={"params": trunk}) if taught else own
            begun = state._replace(learner=state.learner._replace(value=value), key=jax.random.clone(keys[3]))
            found = law_rows(agent, env, begun, jax.random.clone(keys[4]), updates, max(1, updates // 6))
            rows += [{"seed": seed, "taught": taught, "phase": "law", **row} for row in found]
        pd.DataFrame(rows).round(4).to_csv(out / "star.csv", index=False)
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
        "date": time.strftime("%Y-%m-%d"), "seeds": num_seeds, "versions": recording.versions(),
        "environment": env.name, "teaching": teaching, "updates": updates, "settings": dataclasses.asdict(config),
    }  # fmt: skip
    (out / "star.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
