"""FQF: fully parameterised quantile function, IQN with learned fractions.

Paper: "Fully Parameterized Quantile Function for Distributional Reinforcement Learning", Yang, Zhao, Lin, Qin, Bian,
Liu, NeurIPS 2019, arXiv 1911.02140.

IQN draws its fractions at random; FQF learns, for every state, at which N fractions the quantile function is best
approximated by a staircase. A proposal layer gives the N masses of the steps; it descends the Wasserstein-1 error of
the staircase, whose gradient takes nothing but values of the quantile function. The quantiles are trained as IQN's, at
the middles of the steps.

    fractions     tau_i = q_1 + .. + q_i,  q = softmax(proposal(features)),  mid_i = (tau_{i-1} + tau_i) / 2
    law           Z(s, a) = F(s, a, mid_i) with probability q_i
    target        y_j = r + gamma (1 - terminated) F_target(s', a*, mid'_j),
                  a* = argmax over a of sum over j of q'_j F_target(s', a, mid'_j)
    loss          mean of sum over i of sum over j of q'_j |mid_i - 1{u < 0}| huber_kappa(u) / kappa,
                  u = y_j - F(s, a, mid_i); it reaches neither the fractions nor the proposal
    proposal      dW1 / dtau_i = 2 F(tau_i) - F(mid_i) - F(mid_{i+1}), and -c times the entropy of q;
                  it reaches neither the features nor the quantiles
    target copy   of network and proposal, once every `target_period` updates
    acting        epsilon-greedy

Differences from the paper: the target's atoms count by their masses q'_j. The paper and its code count them equally
(`--target-weights equal`, and `--preset paper`), as if the fractions were even; once they have moved that shifts every
target, and the discount adds the shift up (experiments/fqf_target_weights).

The proposal descends by centred RMSProp with decay 0.95 and epsilon 1e-5 as in the paper's code, as is Adam's epsilon
(TensorFlow's mean square starts at 1, ours at 0). The paper's step size 2.5e-9 is the default; its code tries 5e-10 and
5e-11. The entropy is that of q, where the code takes one of the cumulated fractions, with a RMSProp step of its own.
The code's README advises to keep every proposed fraction below 0.98, or to descend the squared slope instead; neither
is done here. The embedding is merged before the last hidden layer, not into the features of the convolution, which is
MinAtar's; rewards are clipped with `--preset paper` only; epsilon falls from the first step on, where the code waits
for the end of the warm-up; evaluation without exploration. `--num-steps` n > 1 replaces r and gamma by the n-step
return and gamma^n.

Run:      python algorithms/value_based/fqf.py --env-id CartPole-v1
Expected: CartPole-v1 500 of 500 within 500,000 steps, with relapses of single seeds: experiments/learning_curves.
"""

from typing import Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, NonNegative, configuration
from jaxrl_dist.distributional import categorical, quantile
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import experience, greedy, networks, portable
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import discrete_action_count

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(greedy.Settings):
    """Settings of FQF. Floats can be swept within one compiled program."""

    cosines: Count = 64
    """cosines that embed a fraction"""
    num_fractions: Count = 32
    """N, steps of the staircase"""
    fraction_learning_rate: NonNegative = 2.5e-9
    """step size of the proposal's RMSProp; at one near the network's the fractions collapse"""
    entropy_weight: NonNegative = 0.0
    """c, weight of the proposal's entropy"""
    target_weights: Literal["mass", "equal"] = "mass"
    """how the target's atoms count in the loss: by their masses, or all alike as in the paper, which is biased"""
    kappa: NonNegative = 1.0
    """threshold of the Huber function in units of return; 0 is plain quantile regression; where laws are narrower than
    this, quantiles are expectiles"""
    risk: str = "neutral"
    """what greedy actions maximise, in targets, acting and evaluation: neutral, cvar:LEVEL, wang:LEVEL, cpw:LEVEL,
    power:LEVEL, norm:NUMBER or mean-variance:WEIGHT"""


# Environments: sizes for a CPU, the same for every algorithm of this family but for its atoms. Paper: Atari's.
PRESETS = {
    "CartPole-v1": greedy.CARTPOLE | {"num_fractions": 8, "fraction_learning_rate": 1e-8, "entropy_weight": 1e-3},
    "Acrobot-v1": greedy.ACROBOT | {"num_fractions": 8, "fraction_learning_rate": 1e-8, "entropy_weight": 1e-3},
    "Catch-bsuite": greedy.CATCH | {"num_fractions": 8, "fraction_learning_rate": 1e-6, "entropy_weight": 1e-3},
    "Breakout-MinAtar": greedy.BREAKOUT
    | {"hidden": (128, 128), "num_fractions": 8, "fraction_learning_rate": 1e-8, "entropy_weight": 1e-3},
    "paper": greedy.ATARI | {"learning_rate": 5e-5, "hidden": (512, 512), "target_weights": "equal"},
}

# -- Networks ---------------------------------------------------------------------------------------------------------


class Proposal(nn.Module):
    """Logits of the staircase's masses, `[batch, features]` -> `[batch, fractions]`; nearly even at the start."""

    num_fractions: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        bound = 0.01 * features.shape[-1] ** -0.5
        return networks.MLP((self.num_fractions,), output_bound=bound, name="layers")(features)


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
    env_steps: jax.Array
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


class Staircase(NamedTuple):
    """Fractions of a batch: masses and middles of the steps `[batch, N]`, edges between them `[batch, N - 1]`."""

    masses: jax.Array
    middles: jax.Array
    edges: jax.Array


def staircase(logits: jax.Array) -> Staircase:
    """The fractions that a proposal `[batch, N]` stands for."""
    chex.assert_rank(logits, 2)
    masses = jax.nn.softmax(logits)
    upper = jnp.cumsum(masses, axis=-1)  # tau_i
    # 0 and 1 are no edges: they do not move, and the quantile function may be infinite there.
    return Staircase(masses, upper - masses / 2, upper[:, :-1])


def target_quantiles(batch: Batch, next_quantiles: jax.Array) -> jax.Array:
    """Reward plus the successor's discounted quantiles, `[batch, N]`, same shape."""
    chex.assert_rank(next_quantiles, 2)
    chex.assert_shape([batch.reward, batch.discount], (len(next_quantiles),))
    return batch.reward[:, None] + batch.discount[:, None] * next_quantiles


def loss_of(
    quantiles: jax.Array, fractions: jax.Array, target: jax.Array, masses: jax.Array | None, kappa: float | jax.Array
) -> jax.Array:
    """Mean quantile Huber loss: quantiles at the fractions, both `[batch, N]`, on targets with masses, `[batch, N]`.

    Without masses the targets count equally.
    """
    chex.assert_rank([quantiles, target], 2)
    chex.assert_equal_shape([quantiles, fractions])
    chex.assert_equal_shape_prefix([quantiles, target], 1)
    if masses is not None:
        chex.assert_equal_shape([target, masses])
    # IQN's (arXiv 1806.06923) at the proposed fractions; the sum over i is not weighed by the masses of its steps.
    return quantile.quantile_huber_loss(
        quantiles, target, fractions, kappa=kappa, over_predicted="sum", target_masses=masses
    ).mean()


def fraction_loss(
    steps: Staircase, at_middles: jax.Array, at_edges: jax.Array, entropy_weight: float | jax.Array
) -> jax.Array:
    """What has the gradient of the staircase's Wasserstein-1 error (FQF, proposition 1), less the weighted entropy.

    The quantile function's values at the middles `[batch, N]` and edges `[batch, N - 1]` are constants here.
    """
    rows, count = steps.masses.shape
    chex.assert_shape([steps.middles, at_middles], (rows, count))
    chex.assert_shape([steps.edges, at_edges], (rows, count - 1))
    # dW1 / dtau_i = 2 F(tau_i) - F(mid_i) - F(mid_{i+1}); times tau_i it is a loss with this gradient.
    slope = jax.lax.stop_gradient(2 * at_edges - at_middles[:, :-1] - at_middles[:, 1:])
    # Of the masses; the official code's is one of the cumulated fractions.
    entropy = categorical.entropy(steps.masses)
    return (slope * steps.edges).sum(-1).mean() - entropy_weight * entropy.mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """FQF on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    num_actions = discrete_action_count(env, env_params)
    config.check()
    clock = config.clock()
    torso = networks.Torso(config.hidden[:-1])
    head = networks.ImplicitQuantileHead(config.hidden[-1], num_actions, config.cosines)
    proposal = Proposal(config.num_fractions)
    risk = risks.parse(config.risk)
    adam = optax.adam(config.learning_rate, eps=config.adam_epsilon)
    rmsprop = optax.rmsprop(config.fraction_learning_rate, decay=0.95, eps=1e-5, centered=True)
    optimizers = optax.partition(
        {"adam": adam, "rmsprop": rmsprop}, {"torso": "adam", "head": "adam", "proposal": "rmsprop"}
    )

    def update(learner: Learner, batch: Batch) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step, and the copy into the target network when it is due."""
        # Target: the law of the successor's greedy action, both by the target network, moved by reward and discount.
        # Its fractions are what that network proposes there, as in the official code.
        features = torso.apply(learner.target_network["torso"], batch.next_observation)
        next_steps = staircase(proposal.apply(learner.target_network["proposal"], features))
        next_quantiles = head.apply(learner.target_network["head"], features, next_steps.middles)
        next_action = risks.value(risk, Law(next_quantiles, next_steps.masses[:, None])).argmax(-1)
        target = target_quantiles(batch, networks.at_action(next_quantiles, next_action))
        target_masses = next_steps.masses if config.target_weights == "mass" else None

        # Losses: one step of Adam on that of the quantiles, one of RMSProp on that of the fractions. The target is a
        # constant, lest it move towards the prediction.
        def objective(parameters):
            """Both losses in one: the first reaches torso and head only, the second the proposal only."""
            features = torso.apply(parameters["torso"], batch.observation)
            constant = jax.lax.stop_gradient(features)
            steps = staircase(proposal.apply(parameters["proposal"], constant))
            middles, edges = jax.lax.stop_gradient((steps.middles, steps.edges))
            quantiles = networks.at_action(head.apply(parameters["head"], features, middles), batch.action)
            at_edges = head.apply(jax.lax.stop_gradient(parameters["head"]), constant, edges)
            at_edges = networks.at_action(at_edges, batch.action)
            loss = loss_of(quantiles, middles, target, target_masses, config.kappa)
            return loss + fraction_loss(steps, quantiles, at_edges, config.entropy_weight), (loss, quantiles, steps)

        new_network, (_, (loss, values, steps), gradient_norm) = descend(optimizers, learner.network, objective)

        # Target network: a copy when it is due. In between it stands still, lest targets move with predictions.
        updates = learner.updates + 1
        target_network = networks.periodic_copy(
            learner.target_network, new_network.parameters, updates, config.target_period
        )

        # Metrics: of this batch, by the networks before the step.
        metrics = {
            "loss": loss, "value": (steps.masses * values).sum(-1).mean(),
            "target": (next_steps.masses * target).sum(-1).mean(),
            "gradient_norm": gradient_norm,
            "fraction_entropy": categorical.entropy(steps.masses).mean(),
        }  # fmt: skip
        return Learner(new_network, target_network, updates), metrics

    def init(key: jax.Array) -> State:
        key, torso_key, head_key, proposal_key, warmup_key = jax.random.split(key, 5)
        observation = jnp.zeros((1, *env.observation_space(env_params).shape))
        torso_parameters = torso.init(torso_key, observation)
        features = torso.apply(torso_parameters, observation)
        parameters = {
            "torso": torso_parameters,
            "head": head.init(head_key, features, jnp.zeros((1, config.num_fractions))),
            "proposal": proposal.init(proposal_key, features),
        }
        learner = Learner(begin(optimizers, parameters), parameters, jnp.int32(0))
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
            learner, metrics = update(state.learner, batch)
            return state._replace(key=key, learner=learner), jax.tree.map(average, metrics)

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def laws(state: State, observation: jax.Array) -> Law:
        features = torso.apply(state.learner.network.parameters["torso"], observation)
        steps = staircase(proposal.apply(state.learner.network.parameters["proposal"], features))
        return Law(head.apply(state.learner.network.parameters["head"], features, steps.middles), steps.masses[:, None])

    def action_values(state: State, observation: jax.Array) -> jax.Array:
        return risks.value(risk, laws(state, observation))

    policy = greedy.policy_of(config, action_values)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        atoms, masses = laws(state, observation)
        return Law(networks.at_action(atoms, action), masses[:, 0])

    def export(state: State) -> dict[str, jax.Array]:
        parts = {name: parameters.get("params", {}) for name, parameters in state.learner.network.parameters.items()}
        return portable.greedy_policy(parts, num_actions, proposal=parts["proposal"]["layers"], **risks.tables(risk))

    claim = Claim(policy.follow, predict, config.discount)
    return Agent(init, step, memoryless(policy.act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)
