"""Rainbow: C51 with double Q-learning, duelling heads, noisy networks, prioritised replay and n-step returns.

Paper: "Rainbow: Combining Improvements in Deep Reinforcement Learning", Hessel et al., AAAI 2018, arXiv 1710.02298.

Six improvements of DQN, made independently, work together: the distribution of the return instead of its mean (C51);
the online network chooses the action that the target network evaluates (double); the state's value and the actions'
advantages have streams of their own (duelling); the weights are drawn anew at every step, so that the agent explores
where it is uncertain (noisy); transitions are replayed in proportion to how badly they were predicted (prioritised);
and targets hold n rewards before they bootstrap.

    target        m = projection of the law of R + gamma^n (1 - terminated) Z_target(s_n, a*) onto the support,
                  R = r_0 + .. + gamma^(n-1) r_(n-1),  a* = argmax over a of E[Z(s_n, a)]
    loss          mean of w KL(m || Z(s, a)),  w = (size P)^-beta over the largest in the batch
    priority      P in proportion to KL(m || Z(s, a))^omega; new transitions get the largest so far
    logits        V_i(s) + A_i(s, a) - mean over a of A_i(s, a),  for every atom i
    noisy layer   (mu + sigma * f(e_in) f(e_out)) x,  f(e) = sign(e) sqrt |e|
    target copy   theta_target <- theta, once every `target_period` updates
    acting        greedy with drawn weights

Differences from the paper: rewards are clipped, and the support reaches from -10 to 10, with `--preset paper` only;
otherwise v_min and v_max belong to the environment, see `--probe-support` and the metric `clipped_mass`. A window is
shorter than n steps, with gamma to the steps it has, not only where an episode terminates but also at a time limit and
at the newest stored step. One draw of noise serves the whole batch (each network has its own), and one all environments
of a step. Priorities are the divergence plus 1e-6, so that none is 0. Images pass MinAtar's convolution instead of
DQN's; evaluation takes the mean weights. Each part can be switched off: `--no...` options, `--num-steps 1`,
`--priority-exponent 0`; without noise, give an epsilon to explore with.

Run:      python algorithms/value_based/rainbow.py --env-id CartPole-v1
Expected: CartPole-v1 500 of 500 within 500,000 steps: experiments/learning_curves.
"""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, Fraction, NonNegative, Real, configuration
from jaxrl_dist.distributional import categorical
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import experience, greedy, networks, policies, portable, replay
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.replay import Priorities
from jaxrl_dist.learning.spaces import discrete_action_count

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(greedy.Settings):
    """Settings of Rainbow. Floats can be swept within one compiled program."""

    num_steps: Count = 3

    epsilon_start: Fraction = 0.0
    epsilon_end: Fraction = 0.0

    num_atoms: Count = 51
    """atoms of the support"""
    v_min: Real = -100.0
    """lowest atom, in units of the discounted return; the default is for rewards up to 1 and gamma 0.99"""
    v_max: Real = 100.0
    """highest atom"""
    double: bool = True
    """choose the target's action by the online network"""
    dueling: bool = True
    """give the last hidden layer two streams, value and advantage"""
    noisy: bool = True
    """draw the weights of the streams anew at every step and update"""
    initial_noise: NonNegative = 0.5
    """sigma_0, standard deviation of a layer's weights at the start, times the root of its inputs"""
    priority_exponent: NonNegative = 0.5
    """omega, how much the error matters for being replayed; 0: not at all"""
    importance_exponent: Fraction = 0.4
    """beta at the first step, how much the loss corrects for the unequal replay; rises to 1"""
    annealing_steps: Count = 100_000
    """environment steps in which beta rises"""
    risk: str = "neutral"
    """what greedy actions maximise, in targets, acting and evaluation: neutral, cvar:LEVEL, wang:LEVEL, cpw:LEVEL,
    power:LEVEL, norm:NUMBER or mean-variance:WEIGHT"""


# Environments: sizes for a CPU, the same for every algorithm of this family but for its atoms. Paper: Atari's.
PRESETS = {
    "CartPole-v1": greedy.CARTPOLE | {"v_min": 0.0, "v_max": 100.0, "annealing_steps": 500_000},
    "Acrobot-v1": greedy.ACROBOT | {"v_min": -100.0, "v_max": 0.0, "annealing_steps": 500_000},
    "Catch-bsuite": {
        "warmup_steps": 500, "replay_capacity": 20_000, "target_period": 100, "learning_rate": 1e-3,
        "hidden": (64, 64),
        "v_min": -1.0, "v_max": 1.0, "num_atoms": 21, "annealing_steps": 20_000,
    },
    "Breakout-MinAtar": {
        "total_steps": 200_000, "batch_size": 32, "hidden": (128,),
        "v_min": 0.0, "v_max": 30.0, "annealing_steps": 300_000,
    },
    "paper": {
        "num_envs": 1, "steps_per_iteration": 4, "updates_per_iteration": 1, "warmup_steps": 20_000,
        "replay_capacity": 1_000_000, "batch_size": 32, "target_period": 2_000, "learning_rate": 6.25e-5,
        "adam_epsilon": 1.5e-4, "annealing_steps": 50_000_000, "hidden": (512,),
        "reward_clip": 1.0, "v_min": -10.0, "v_max": 10.0,
    },
}  # fmt: skip

# -- Networks ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Logits of the atoms of every action, `[batch, *observation]` -> `[batch, actions, atoms]`."""

    hidden: tuple[int, ...]
    num_actions: int
    num_atoms: int
    dueling: bool
    initial_noise: float | jax.Array

    @nn.compact
    def __call__(self, observation: jax.Array, noisy: bool) -> jax.Array:
        features = networks.Torso(self.hidden[:-1], name="torso")(observation)

        # Noisy layers (arXiv 1706.10295).
        def stream(name: str, outputs: int) -> jax.Array:
            hidden = networks.NoisyDense(self.hidden[-1], self.initial_noise, name=f"{name}_0")(features, noisy)
            return networks.NoisyDense(outputs, self.initial_noise, name=f"{name}_1")(nn.relu(hidden), noisy)

        # Duelling (arXiv 1511.06581), atom by atom: the mean that is taken off is over actions.
        advantage = stream("advantage", self.num_actions * self.num_atoms)
        advantage = advantage.reshape(-1, self.num_actions, self.num_atoms)
        return networks.duel(stream("value", self.num_atoms), advantage) if self.dueling else advantage


# -- State ------------------------------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What updates change."""

    network: Trained
    target_network: chex.ArrayTree
    updates: jax.Array


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    experience: Experience
    priorities: Priorities
    env_steps: jax.Array
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


def target_masses(batch: Batch, next_masses: jax.Array, support: jax.Array) -> jax.Array:
    """Law of reward + discount * Z for Z with the masses `[batch, atoms]`, projected onto the support `[atoms]`."""
    rows, atoms = next_masses.shape
    chex.assert_shape([batch.reward, batch.discount], (rows,))
    chex.assert_shape(support, (atoms,))
    # The Cramer projection (arXiv 1802.08163). With discount 0, after a termination, all mass is at the reward.
    return categorical.project_return(batch.reward, batch.discount, next_masses, support)


def loss_of(logits: jax.Array, target: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted mean KL divergence of the laws of the actions taken, `[batch, atoms]`, from their targets; weights
    `[batch]`. Also each one's divergence, unweighted: the new priorities `[batch]`."""
    chex.assert_rank(logits, 2)
    chex.assert_equal_shape([logits, target])
    chex.assert_shape(weights, (len(logits),))
    divergence = categorical.kl_divergence(target, logits)
    return (weights * divergence).mean(), divergence


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """Rainbow on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    num_actions = discrete_action_count(env, env_params)
    config.check()
    clock = config.clock()
    network = Network(config.hidden, num_actions, config.num_atoms, config.dueling, config.initial_noise)
    risk = risks.parse(config.risk)
    support = categorical.support(config.v_min, config.v_max, config.num_atoms)
    adam = optax.adam(config.learning_rate, eps=config.adam_epsilon)

    def logits_of(parameters: chex.ArrayTree, observation: jax.Array, key: jax.Array) -> jax.Array:
        return network.apply(parameters, observation, config.noisy, rngs={"noise": key})

    def update(
        learner: Learner, batch: Batch, weights: jax.Array, key: jax.Array
    ) -> tuple[Learner, jax.Array, dict[str, jax.Array]]:
        """One gradient step, and the copy into the target network when it is due; also the batch's divergences."""
        # Noise: a draw of its own for each of the three passes.
        online_key, target_key, choosing_key = jax.random.split(key, 3)

        # Target: the law of the successor's greedy action by the target network, moved and projected. With `double` the
        # online network has chosen, so that the error that makes it look best is not in its law (arXiv 1509.06461).
        next_laws = jax.nn.softmax(logits_of(learner.target_network, batch.next_observation, target_key))
        choosing = next_laws
        if config.double:
            choosing = jax.nn.softmax(logits_of(learner.network.parameters, batch.next_observation, choosing_key))
        next_action = risks.value(risk, Law(support, choosing), ascending=True).argmax(-1)
        next_masses = networks.at_action(next_laws, next_action)
        target = target_masses(batch, next_masses, support)

        # Loss: one step of Adam. The target is a constant, lest it move towards the prediction.
        def objective(parameters):
            logits = networks.at_action(logits_of(parameters, batch.observation, online_key), batch.action)
            loss, divergence = loss_of(logits, target, weights)
            return loss, (divergence, (jax.nn.softmax(logits) * support).sum(-1))

        new_network, (loss, (divergence, values), gradient_norm) = descend(adam, learner.network, objective)

        # Target network: a copy when it is due. In between it stands still, lest targets move with predictions.
        updates = learner.updates + 1
        target_network = networks.periodic_copy(
            learner.target_network, new_network.parameters, updates, config.target_period
        )

        # Metrics: of this batch, by the networks before the step.
        metrics = {
            "loss": loss, "value": values.mean(), "target": (target * support).sum(-1).mean(),
            "clipped_mass": categorical.clipped_mass(batch.reward, batch.discount, next_masses, support).mean(),
            "gradient_norm": gradient_norm,
        }  # fmt: skip
        return Learner(new_network, target_network, updates), divergence, metrics

    def init(key: jax.Array) -> State:
        key, network_key, warmup_key = jax.random.split(key, 3)
        parameters = network.init(network_key, jnp.zeros((1, *env.observation_space(env_params).shape)), False)
        learner = Learner(begin(adam, parameters), parameters, jnp.int32(0))
        filled = experience.warm_up(env, env_params, warmup_key, config)
        return State(learner, filled, replay.equal_priorities(filled.replay), jnp.int32(clock.warmup_steps), key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        def interact(state, _):
            key, act_key, step_key = jax.random.split(state.key, 3)
            action = policy.explore(state, state.experience.interaction.observation, act_key)
            written = state.experience.replay.position + jnp.arange(config.num_envs)
            lived, _, episodes = experience.collect(env, env_params, state.experience, action, step_key)
            highest = jnp.full(config.num_envs, state.priorities.largest)
            priorities = replay.set_priorities(state.priorities, written, highest)
            return State(state.learner, lived, priorities, state.env_steps + config.num_envs, key), episodes

        def learn(state, _):
            key, sample_key, noise_key = jax.random.split(state.key, 3)
            # Prioritised replay (arXiv 1511.05952): weights undo what unequal sampling does to the loss, more so later.
            indices, probabilities = replay.sample_by_priority(state.priorities, sample_key, config.batch_size)
            batch = experience.batch_at(
                state.experience, indices, num_steps=config.num_steps, gamma=config.discount,
                reward_clip=config.reward_clip,
            )  # fmt: skip
            beta = policies.linear_schedule(config.importance_exponent, 1.0, config.annealing_steps, state.env_steps)
            weights = replay.importance_weights(probabilities, state.experience.replay.size, beta)
            learner, divergence, metrics = update(state.learner, batch, weights, noise_key)
            # By the divergence without its weight. A priority of 0 would never be drawn again.
            raised = (divergence + 1e-6) ** config.priority_exponent
            priorities = replay.set_priorities(state.priorities, indices, raised)
            return state._replace(key=key, learner=learner, priorities=priorities), jax.tree.map(average, metrics)

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def laws(logits: jax.Array) -> Law:
        return Law(support, jax.nn.softmax(logits))

    def mean_logits(state: State, observation: jax.Array) -> jax.Array:
        return network.apply(state.learner.network.parameters, observation, False)

    def mean_values(state: State, observation: jax.Array) -> jax.Array:
        return risks.value(risk, laws(mean_logits(state, observation)), ascending=True)

    def drawn_values(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        logits = logits_of(state.learner.network.parameters, observation, key)
        return risks.value(risk, laws(logits), ascending=True)

    policy = greedy.policy_of(config, mean_values, drawn_values)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        masses = networks.at_action(laws(mean_logits(state, observation)).masses, action)
        return Law(jnp.broadcast_to(support, masses.shape), masses)

    def export(state: State) -> dict[str, jax.Array]:
        parameters = state.learner.network.parameters["params"]
        head = {
            stream: {
                "layers": {
                    f"{part}_{i}": parameters[f"{stream}_{i}"][part][None]
                    for part in ("kernel", "bias")
                    for i in (0, 1)
                }
            }
            for stream in ("advantage", "value")[: 1 + config.dueling]
        }
        parts = {"torso": parameters.get("torso", {}), "head": head}
        return portable.greedy_policy(parts, num_actions, support=support, **risks.tables(risk))

    claim = Claim(policy.follow, predict, config.discount)
    return Agent(init, step, memoryless(policy.act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)
