"""PE-DQN: diverse projection ensembles, exploring where two representations of one law disagree.

Paper: "Diverse Projection Ensembles for Distributional Reinforcement Learning", Zanger, Böhmer, Spaan, ICLR 2024, arXiv
2306.07124.

A quantile model (QR-DQN's) and a categorical one (C51's) learn from the same target, the equal mixture of both. Where
little was seen they generalise in different ways, so the distance of their laws says how new an action is. A second
pair of models learns the discounted sum of distances to come, for which the agent goes to new things far away.

    laws          theta_i(s, a) with probability 1/K;  z_i with probability p_i = softmax_i(s, a);  M: half of each
    prior         theta = network + scale * random network, which never learns
    target        law of r + gamma (1 - terminated) M_target(s', a*),  a* = argmax over a of E[M_target(s', a)]
    loss          of theta: mean of sum over i of E_y |tau_i - 1{y < theta_i}| huber_kappa(y - theta_i) / kappa
                  of p: cross-entropy to the target's projection onto z
    disagreement  w(s, a) = Wasserstein-1 distance of the two laws
    bonus         b(s, a) = w(s, a) + E[U(s, a)],  U the mixture of the second pair, whose support starts at 0
    its target    law of gamma (1 - terminated) (w(s', a+) + U(s', a+)),  a+ = argmax of E[M] + beta b,  all by targets
    target copy   theta_target <- theta, once every `target_period` updates
    acting        argmax over a of E[M(s, a)] + beta b(s, a), epsilon-greedy; beta falls in a straight line

Differences: the paper's equations learn b as one sum; its code, and so this file, adds the present distance to what is
learned of later ones, which says little of actions never tried. Unlike here that code (anyboby/diverse-projection-
ensembles, for VizDoom) finds a*, a+ and w by the online network, samples by priority, lets sums of distances go on
through the end of an episode, scales distances by running statistics, cuts gradients, and lets the second pair wait;
projects quantiles onto the support before it takes distances, and has kappa 1. As there the prior reads features that
are learned, if there are layers below the heads. Weights, the prior's too, start as in the rest of this family, smaller
than the paper's for bsuite. `--propagate False` is the paper's ablation: bonuses of the present distance alone. Images
pass MinAtar's convolution; evaluation without exploration and without a bonus.

Run:      python algorithms/value_based/pe_dqn.py --env-id DeepSea-bsuite
Expected: DeepSea-bsuite (8 x 8) 0.99 of 0.99 within 2,000 steps; larger ones in experiments/deep_sea.
"""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, NonNegative, Positive, Real, configuration
from jaxrl_dist.distributional import categorical, quantile
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import experience, greedy, networks, policies, portable
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import discrete_action_count

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(greedy.Settings):
    """Settings of PE-DQN. Floats can be swept within one compiled program."""

    num_atoms: Count = 101
    """quantiles of the one model, and atoms of the other"""
    v_min: Real = -100.0
    """lowest atom, in units of the discounted return; the default is for rewards up to 1 and gamma 0.99"""
    v_max: Real = 100.0
    """highest atom"""
    bonus_range: Positive = 2.0
    """highest atom of the sum of distances to come, in parts of v_max - v_min; the lowest is 0"""
    kappa: NonNegative = 0.0
    """threshold of the Huber function in units of return; 0 is plain quantile regression"""
    prior_scale: NonNegative = 20.0
    """what the random network that is added to the quantiles is multiplied by"""
    bonus_weight_start: NonNegative = 5.0
    """beta, what a bonus weighs beside the value, at the first step"""
    bonus_weight_end: NonNegative = 0.01
    """the same from `bonus_steps` on"""
    bonus_steps: Count = 50_000
    """environment steps in which that weight falls, warm-up included"""
    propagate: bool = True
    """whether bonuses count the distances to come"""
    risk: str = "neutral"
    """what greedy actions maximise of the mixture, in targets, acting and evaluation: neutral, cvar:LEVEL, wang:LEVEL,
    cpw:LEVEL, power:LEVEL, norm:NUMBER or mean-variance:WEIGHT"""


# Environments: sizes for a CPU. Paper: those for bsuite, whose sea has no reward that would be cut.
PAPER = {
    "num_envs": 1, "updates_per_iteration": 1, "warmup_steps": 128, "replay_capacity": 10_000, "batch_size": 128,
    "target_period": 4, "learning_rate": 5e-4, "adam_epsilon": 8e-6, "epsilon_start": 0.0, "epsilon_end": 0.0,
    "hidden": (512,), "v_min": -1.0, "v_max": 1.0, "bonus_weight_end": 5.0, "reward_clip": 1.0,
}  # fmt: skip
PRESETS = {
    "DeepSea-bsuite": PAPER | {
        "total_steps": 5_000, "hidden": (128,), "num_atoms": 21, "learning_rate": 1e-3, "bonus_weight_end": 0.05,
        "bonus_steps": 1_600, "reward_clip": 0.0,
    },
    "CartPole-v1": greedy.CARTPOLE | {"v_min": 0.0, "v_max": 100.0, "num_atoms": 51},
    "paper": PAPER,
}  # fmt: skip

# -- Networks ---------------------------------------------------------------------------------------------------------


class Members(NamedTuple):
    """One law as two models have it, `[..., atoms]` both."""

    quantiles: jax.Array
    logits: jax.Array


class Network(nn.Module):
    """Features of `[batch, *observation]`, and `[batch, 4, actions, atoms]`: of returns quantiles and logits, then the
    same of bonuses."""

    hidden: tuple[int, ...]
    num_actions: int
    num_atoms: int

    @nn.compact
    def __call__(self, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = networks.Torso(self.hidden[:-1], name="torso")(observation)
        outputs = networks.EnsembleMLP(4, (self.hidden[-1], self.num_actions * self.num_atoms), name="heads")(features)
        return features, outputs.reshape(-1, 4, self.num_actions, self.num_atoms)


class View(NamedTuple):
    """What a network says of every action: laws `[batch, actions, atoms]`, numbers `[batch, actions]`."""

    law: Law
    to_come: Law  # of the sum of distances after this one
    value: jax.Array
    distance: jax.Array
    bonus: jax.Array


# -- State ------------------------------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What updates change, but for the prior, which stays as it was drawn."""

    network: Trained
    target_network: chex.ArrayTree
    prior: chex.ArrayTree
    updates: jax.Array


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    experience: Experience
    env_steps: jax.Array
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


def mixture(members: Members, support: jax.Array) -> Law:
    """Half of each model's law, `[..., atoms]` -> `[..., 2 atoms]`."""
    chex.assert_equal_shape(members)
    chex.assert_shape(support, members.logits.shape[-1:])
    masses = jnp.full(members.quantiles.shape, 1 / support.shape[-1]), jax.nn.softmax(members.logits)
    atoms = members.quantiles, jnp.broadcast_to(support, members.logits.shape)
    return Law(jnp.concatenate(atoms, -1), jnp.concatenate(masses, -1) / 2)


def disagreement(members: Members, support: jax.Array) -> jax.Array:
    """Wasserstein-1 distance of the two models' laws, `[..., atoms]` -> `[...]`, in units of return."""
    chex.assert_equal_shape(members)
    count, masses = support.shape[-1], jax.nn.softmax(members.logits)
    # The area between the two quantile functions: both are constant wherever the intervals of probability that a
    # quantile and an atom cover overlap.
    ascending = quantile.sort_atoms(members.quantiles.reshape(-1, count)).reshape(masses.shape)
    above = jnp.cumsum(masses, -1)[..., None, :]
    below, edges = above - masses[..., None, :], jnp.linspace(0, 1, count + 1)[:, None]
    overlap = jnp.maximum(jnp.minimum(edges[1:], above) - jnp.maximum(edges[:-1], below), 0)
    return (overlap * jnp.abs(ascending[..., None] - support)).sum((-2, -1))


def at_action(tree: chex.ArrayTree, action: jax.Array) -> chex.ArrayTree:
    """Of all arrays `[batch, actions, ...]` what belongs to one action per row, `[batch, ...]`."""
    return jax.tree.map(lambda x: networks.at_action(x, action), tree)


def target_law(reward: jax.Array, discount: jax.Array, following: Law) -> Law:
    """Law of reward + discount * Z, `[batch]`, `[batch]`, `[batch, atoms]` -> `[batch, atoms]`."""
    chex.assert_rank([*following], 2)
    chex.assert_shape([reward, discount], (len(following.atoms),))
    return Law(reward[:, None] + discount[:, None] * following.atoms, following.masses)


def loss_of(members: Members, target: Law, support: jax.Array, kappa: float | jax.Array) -> jax.Array:
    """Mean over the batch of both models' losses at the actions taken, `[batch, atoms]`, on one target."""
    chex.assert_rank([*members, *target], 2)
    # Atoms of the target weigh what their probability says: those of its two halves differ.
    regression = quantile.quantile_huber_loss(
        members.quantiles, target.atoms, quantile.midpoints(support.shape[-1]), kappa=kappa, over_predicted="sum",
        target_masses=target.masses,
    )  # fmt: skip
    return (regression + categorical.cross_entropy(categorical.project(*target, support), members.logits)).mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """PE-DQN on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    num_actions = discrete_action_count(env, env_params)
    config.check()
    clock = config.clock()
    network = Network(config.hidden, num_actions, config.num_atoms)
    random_head = networks.ActionHead(config.hidden[-1], num_actions, config.num_atoms)
    risk = risks.parse(config.risk)
    support = categorical.support(config.v_min, config.v_max, config.num_atoms)
    bonus_support = config.bonus_range * (support - config.v_min)
    weights = config.bonus_weight_start, config.bonus_weight_end, config.bonus_steps
    adam = optax.adam(config.learning_rate, eps=config.adam_epsilon)

    def models(parameters, prior, observation: jax.Array) -> tuple[Members, Members]:
        """Of returns and of bonuses to come, `[batch, actions, atoms]`."""
        features, outputs = network.apply(parameters, observation)
        quantiles, logits, *of_bonuses = jnp.unstack(outputs, axis=1)
        fixed = random_head.apply(prior, jax.lax.stop_gradient(features))
        return Members(quantiles + config.prior_scale * fixed, logits), Members(*of_bonuses)

    def look(parameters, prior, observation: jax.Array) -> View:
        of_returns, of_bonuses = models(parameters, prior, observation)
        law, to_come = mixture(of_returns, support), mixture(of_bonuses, bonus_support)
        distance = disagreement(of_returns, support)
        bonus = distance + laws.mean(to_come) if config.propagate else distance
        return View(law, to_come, risks.value(risk, law), distance, bonus)

    def update(learner: Learner, batch: Batch, weight: jax.Array) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step, and the copy into the target network when it is due."""
        # Target: the mixture at the successor's greedy action, both by the target network, moved.
        following = look(learner.target_network, learner.prior, batch.next_observation)
        target = target_law(batch.reward, batch.discount, at_action(following.law, following.value.argmax(-1)))

        # That of the bonus: at the action to which the bonus leads, and with its distance as a reward.
        explored = at_action(following, (following.value + weight * following.bonus).argmax(-1))
        bonus_target = target_law(batch.discount * explored.distance, batch.discount, explored.to_come)

        # Loss: one step of Adam. Both pairs learn from mixtures, each of its own.
        def objective(parameters):
            of_returns, of_bonuses = at_action(models(parameters, learner.prior, batch.observation), batch.action)
            loss = loss_of(of_returns, target, support, config.kappa)
            loss += loss_of(of_bonuses, bonus_target, bonus_support, config.kappa)
            return loss, laws.mean(mixture(of_returns, support))

        new_network, (loss, value, gradient_norm) = descend(adam, learner.network, objective)

        # Target network: a copy when it is due. In between it stands still, lest targets move with predictions.
        updates = learner.updates + 1
        target_network = networks.periodic_copy(
            learner.target_network, new_network.parameters, updates, config.target_period
        )

        # Metrics: of this batch, by the networks before the step.
        outside = jnp.abs(target.atoms - jnp.clip(target.atoms, support[0], support[-1])) > 1e-4 * jnp.ptp(support)
        metrics = {
            "loss": loss, "value": value.mean(), "target": laws.mean(target).mean(), "gradient_norm": gradient_norm,
            "clipped_mass": jnp.where(outside, target.masses, 0).sum(-1).mean(),
            "disagreement": explored.distance.mean(), "bonus": explored.bonus.mean(),
        }  # fmt: skip
        return Learner(new_network, target_network, learner.prior, updates), metrics

    def init(key: jax.Array) -> State:
        key, network_key, prior_key, warmup_key = jax.random.split(key, 4)
        observation = jnp.zeros((1, *env.observation_space(env_params).shape))
        (features, _), parameters = network.init_with_output(network_key, observation)
        prior = random_head.init(prior_key, features)
        learner = Learner(begin(adam, parameters), parameters, prior, jnp.int32(0))
        filled = experience.warm_up(env, env_params, warmup_key, config)
        return State(learner, filled, jnp.int32(clock.warmup_steps), key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        def interact(state, _):
            key, act_key, step_key = jax.random.split(state.key, 3)
            action = policy.explore(state, state.experience.interaction.observation, act_key)
            lived, _, episodes = experience.collect(env, env_params, state.experience, action, step_key)
            return State(state.learner, lived, state.env_steps + config.num_envs, key), episodes

        def learn(state, _):
            key, sample_key = jax.random.split(state.key)
            batch = experience.sample_n_step(
                state.experience, sample_key, config.batch_size, num_steps=config.num_steps, gamma=config.discount,
                reward_clip=config.reward_clip,
            )  # fmt: skip
            learner, metrics = update(state.learner, batch, policies.linear_schedule(*weights, state.env_steps))
            return state._replace(key=key, learner=learner), jax.tree.map(average, metrics)

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def present(state: State, observation: jax.Array) -> View:
        return look(state.learner.network.parameters, state.learner.prior, observation)

    def explored_values(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        view = present(state, observation)
        return view.value + policies.linear_schedule(*weights, state.env_steps) * view.bonus

    policy = greedy.policy_of(config, lambda *now: present(*now).value, explored_values)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        return at_action(present(state, observation).law, action)

    def export(state: State) -> dict[str, jax.Array]:
        learned, prior = (x["params"] for x in (state.learner.network.parameters, state.learner.prior))
        quantiles, logits = ({name: x[i : i + 1] for name, x in learned["heads"].items()} for i in (0, 1))
        scale = {"kernel_1": config.prior_scale, "bias_1": config.prior_scale}
        prior = {name: scale.get(name, 1) * x for name, x in prior["advantage"]["layers"].items()}
        # The prior is part of the quantiles' perceptron: hidden units beside theirs.
        joined = {name: jnp.concatenate([quantiles[name], prior[name]], -1) for name in ("kernel_0", "bias_0")}
        joined["kernel_1"] = jnp.concatenate([quantiles["kernel_1"], prior["kernel_1"]], 1)
        joined["bias_1"] = quantiles["bias_1"] + prior["bias_1"]
        parts = {"torso": learned.get("torso", {}), "head": {"advantage": {"layers": logits}}}
        more = {"support": support, "quantiles": {"layers": joined}} | risks.tables(risk)
        return portable.greedy_policy(parts, num_actions, **more)

    claim = Claim(policy.follow, predict, config.discount)
    return Agent(init, step, memoryless(policy.act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)
