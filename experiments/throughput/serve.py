"""Answers lines of JSON with seconds: what `side_by_side.py` starts in the Python of each checkout and of each peer.

`{"compile": case}` -> `{"seconds", "cpu_seconds", "updates"}`, and `"missing"` with a reason; then
`{"run": iterations}` -> `{"seconds", "cpu_seconds"}` of training that goes on. The first argument says what is served:
ours, floor, rejax, or purejaxrl with the folder of its `dqn.py` and `ppo.py`. All train on one device.
"""

import importlib
import importlib.util
import json
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import workloads  # beside this file


def agent_of(case: workloads.Case):
    """The agent of an algorithm of this zoo, whichever year it is of."""
    from jaxrl_dist import envs
    from jaxrl_dist.running.catalog import find_algorithm

    module = find_algorithm(case.algorithm)
    return module.make_agent(module.Config(**case.settings), *envs.make(case.environment))


def training_of(agent):
    """`begin(key)` and `many(state, iterations)` of an agent's training."""
    from jaxrl_dist.running import training

    def begin(key):
        return training.begin(agent, key)

    def many(state, iterations):
        return training.advance(agent, state, jnp.int32(0), iterations)

    return begin, many


def ours(case: workloads.Case):
    """`begin` and `many` of an algorithm of this zoo."""
    return training_of(agent_of(case))


def without_decompositions() -> None:
    """Let orthogonal initial weights be drawn from a normal law: on two cores a QR decomposition under `vmap` does not
    end. What an update takes is the same."""
    from flax.linen import initializers

    for module in (jax.nn.initializers, initializers):
        module.orthogonal = lambda scale=1.0, *_, **__: jax.nn.initializers.normal(0.1 * scale)


def rejax(case: workloads.Case):
    """The same for rejax, one of whose iterations is one environment step and one update."""
    without_decompositions()
    import rejax as peer
    from flax import linen as nn
    from rejax.algos import dqn, iqn

    settings = case.settings
    if case.algorithm == "ppo":
        network = {"hidden_layer_sizes": settings["hidden"], "activation": "tanh"}
        shapes = {name: settings[name] for name in ("num_envs", "num_steps", "num_epochs", "num_minibatches")}
        algorithm = peer.get_algo("ppo").create(
            env=case.environment, total_timesteps=10_000_000, skip_initial_evaluation=True, max_grad_norm=0.5,
            agent_kwargs=network, **shapes,
        )  # fmt: skip

        def rollouts(state, iterations):
            return jax.lax.fori_loop(0, iterations, lambda _, state: algorithm.train_iteration(state), state)

        return algorithm.init_state, rollouts
    common = {
        "env": case.environment, "num_envs": 1, "num_epochs": 1, "batch_size": settings["batch_size"],
        "buffer_size": settings["replay_capacity"], "fill_buffer": settings["batch_size"],
        "total_timesteps": 10_000_000, "skip_initial_evaluation": True,
    }  # fmt: skip
    if case.algorithm == "sac":
        hidden = {"hidden_layer_sizes": settings["critic_hidden"]}
        algorithm = peer.get_algo("sac").create(**common, **hidden)
    elif case.algorithm == "dqn":
        network = dqn.EpsilonGreedyPolicy(dqn.DiscreteQNetwork)(
            hidden_layer_sizes=settings["hidden"], action_dim=2, activation=nn.relu
        )
        algorithm = peer.get_algo("dqn").create(**common).replace(agent=network, ddqn=False)
    elif case.algorithm == "iqn":
        kwargs = {"hidden_layer_sizes": settings["hidden"], "activation": "relu"}
        counts = {"num_tau_samples": 64, "num_tau_prime_samples": 64}
        algorithm = iqn.IQN.create(**common, **counts, agent_kwargs=kwargs)
    else:
        return None

    def many(state, iterations):
        return jax.lax.fori_loop(0, iterations, lambda _, state: algorithm.train_iteration(state), state)

    return algorithm.init_state, many


def purejaxrl(case: workloads.Case, folder: str):
    """The same for purejaxrl's DQN and PPO, which train from the start and for a fixed number of steps: there is no
    state."""
    if case.algorithm not in ("dqn", "ppo"):
        return None
    without_decompositions()
    import gymnax.wrappers.purerl

    jax.tree_map = jax.tree.map  # which it calls and JAX has no more
    sys.modules["wandb"] = types.ModuleType("wandb")
    sys.modules["purejaxrl.wrappers"] = gymnax.wrappers.purerl  # what its own became
    path = Path(folder) / f"{case.algorithm}.py"
    specification = importlib.util.spec_from_file_location(f"purejaxrl_{case.algorithm}", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    settings = case.settings
    config = {"ENV_NAME": case.environment, "NUM_ENVS": settings["num_envs"], "LR": 2.5e-4, "GAMMA": 0.99}
    if case.algorithm == "dqn":
        config |= {
            "BUFFER_SIZE": settings["replay_capacity"], "BUFFER_BATCH_SIZE": settings["batch_size"],
            "TOTAL_TIMESTEPS": steps_of(case), "EPSILON_START": 1.0, "EPSILON_FINISH": 0.05,
            "EPSILON_ANNEAL_TIME": 50_000, "TARGET_UPDATE_INTERVAL": 1_000, "TAU": 1.0,
            "LEARNING_STARTS": settings["batch_size"], "TRAINING_INTERVAL": 1,
        }  # fmt: skip
    else:
        config |= {
            "NUM_STEPS": settings["num_steps"], "UPDATE_EPOCHS": settings["num_epochs"],
            "NUM_MINIBATCHES": settings["num_minibatches"], "ACTIVATION": "tanh", "ANNEAL_LR": False,
            "TOTAL_TIMESTEPS": steps_of(case) * settings["num_envs"] * settings["num_steps"],
            "GAE_LAMBDA": 0.95, "CLIP_EPS": 0.2, "ENT_COEF": 0.01, "VF_COEF": 0.5, "MAX_GRAD_NORM": 0.5,
        }  # fmt: skip
    train = module.make_train(config)
    return lambda key: key, lambda key, iterations: train(key)["metrics"]


def steps_of(case: workloads.Case) -> int:
    """The iterations of one call of purejaxrl's `train` for each run; DQN's first ones, until it holds a batch, do not
    update."""
    if case.algorithm == "ppo":
        return max(64 // case.runs, 4)
    return max(4_000 // case.runs, 400)


def updates_of(case: workloads.Case, fixed: bool) -> float:
    """Updates in an iteration of all runs."""
    without = case.settings["batch_size"] / steps_of(case) if fixed and case.algorithm == "dqn" else 0
    return case.runs * case.updates * (1 - without)


def floor(case: workloads.Case):
    """Only the matrix products of ours, one after another."""
    import floor as products  # beside this file

    if case.runs > 1:
        return None
    agent = agent_of(case)
    run = products.program(products.products_of(agent.step, jax.eval_shape(agent.init, jax.random.key(0))))
    run(1)  # compiles
    return run


def compiled(begin, many, runs: int, fixed: bool):
    """`run(iterations)`, which goes on from where it stopped, or if `fixed` does the same again."""
    keys = jax.random.split(jax.random.key(0), runs)
    if runs > 1:
        begin, many = jax.vmap(begin), jax.vmap(many, in_axes=(0, None))
    held = [jax.block_until_ready(jax.jit(begin)(keys if runs > 1 else keys[0]))]
    program = jax.jit(many).lower(held[0], jnp.int32(1)).compile()

    def run(iterations: int) -> None:
        out = jax.block_until_ready(program(held[0], jnp.int32(iterations)))
        if not fixed:
            held[0] = out

    return run


def main(what: str, *more: str) -> None:
    run = None
    for line in sys.stdin:
        asked, began, cpu, answer = json.loads(line), time.perf_counter(), time.process_time(), {}
        if name := asked.get("compile"):
            case, fixed = workloads.CASES[name], what == "purejaxrl"
            made = globals()[what](case, *more)
            run = compiled(*made, case.runs, fixed) if isinstance(made, tuple) else made
            answer = {"updates": updates_of(case, fixed), "iterations": steps_of(case) if fixed else None}
            answer |= {} if run else {"missing": f"{what} has no {name}"}
        else:
            run(asked["run"])
        seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(seconds | answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
