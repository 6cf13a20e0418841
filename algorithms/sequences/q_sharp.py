"""Q#: a frozen policy of tokens, guided by the learned law of what it will earn.

Paper: "Q#: Provably Optimal Distributional RL for LLM Post-Training", Zhou, Wang, Chang, Gao, Kallus, Weinberger,
Brantley, Sun, NeurIPS 2025, arXiv 2502.20548; code jinpz/q_sharp. CD: "Controlled Decoding from Language Models",
Mudgal et al., arXiv 2310.17022.

What is maximised is E[R] - eta KL(pi || pi_ref): a reward at the end of a sequence, without leaving a reference policy
far behind. Tokens are the actions and prefixes the states, so nothing is random but the policy, and the best one is the
reference tilted by a functional of the law of R under the reference itself. That law is learned by maximum likelihood
from completions that the reference has sampled: no bootstrapping, no policy gradient, no change of the reference.

    pi*(a|s)   proportional to pi_ref(a|s) exp(Q*(s, a) / eta)                                              (1)
    Q*(s, a)   = eta log E_ref[exp(R / eta) | s, a] = eta log sum over i of p_i(s, a) exp(z_i / eta)        (2)
    loss       mean over tokens of completions of -sum over i of m_i log p_i(s, a), m = R projected onto z  (3)
    CD         E_ref[R | s, a] / eta in place of Q* / eta in (1): optimal only in the limit of large eta

The law p is on the atoms z of a categorical network; two at 0 and 1 are the probability of success. The reference comes
first, out of the same program: `pretrain` imitates an environment's demonstrations (`envs/tokens.py`), with the loss on
completions only, and the value network starts as its copy, but for its outputs. Both networks act a token at a time,
with their keys and values as the policy's memory. `--roll-in guided` is the paper's data aggregation: tokens before a
uniformly drawn one are the guided policy's, those from there on the reference's, and only laws behind which all tokens
were the reference's are learned.

Differences from the paper and its code: one batch of new completions per update and no stored ones; completions as they
come (for star graphs the code takes one right and one wrong for each prompt, so that its p is no probability); the laws
of all tokens come out of one pass (a head with atoms for every token; there one pass for each of the `--top-k` tokens);
`eta` is a temperature everywhere, CD has the mean over eta (their star code the mean's logarithm).

Evaluation draws from the guided policy, or takes its likeliest tokens. What is claimed is the law under the reference.

Run:      python algorithms/sequences/q_sharp.py --env-id token/countdown3
          python algorithms/sequences/q_sharp.py --env-id token/tree --guide cd
Expected: token/countdown3, from 0.13 of the completions right to 0.29; star graphs: experiments/guided_decoding.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, Clock, Policy
from jaxrl_dist.configuration import Count, Natural, NonNegative, Positive, Real, configuration, require
from jaxrl_dist.distributional import categorical
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import interaction, rollouts, transformer
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import discrete_action_count, require_environment
from jaxrl_dist.learning.transformer import Cache, Transformer

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config:
    """Settings of Q#. Floats can be swept within one compiled program."""

    discount: ClassVar[float] = 1.0  # of the returns that --probe-support looks for

    num_envs: Count = 256
    """prompts per update, each completed once"""
    pretraining: Natural = 3_000
    """updates of the reference policy on demonstrations, before all others"""
    pretraining_batch: Count = 128
    """demonstrations per update of the reference"""

    eta: Positive = 0.1
    """how much reward a nat of divergence from the reference is worth: small ones guide hard"""
    guide: Literal["q_sharp", "cd"] = "q_sharp"
    """what is added to the reference's log probabilities: Q*, or the mean of the law, both over eta"""
    temperature: Positive = 1.0
    """what the reference's logits are divided by where it is guided"""
    top_k: Natural = 0
    """tokens that can be chosen, those likeliest by the reference; 0: all"""
    decoding: Literal["sample", "greedy"] = "sample"
    """whether evaluation draws from the guided policy or takes its likeliest token"""
    roll_in: Literal["reference", "guided"] = "reference"
    """whose tokens completions begin with"""

    num_atoms: Count = 2
    """atoms of the law of the reward"""
    v_min: Real = 0.0
    """lowest atom, in units of reward"""
    v_max: Real = 1.0
    """highest atom; not above what can be earned, for whatever mass is left there counts exp(z / eta)"""
    learning_rate: NonNegative = 1e-3
    """step size of the value network's Adam"""
    pretraining_learning_rate: NonNegative = 2e-3
    """the largest step size of the reference's AdamW, which rises at first and falls by a cosine to a tenth"""
    weight_decay: NonNegative = 0.01
    """of the reference's AdamW"""
    gradient_bound: Positive = 1.0
    """the longest gradient of either network; longer ones are shortened to it"""

    width: Count = 64
    """width of both transformers"""
    num_blocks: Count = 2
    """blocks of each"""
    num_heads: Count = 4
    """heads of attention in each block"""


# Sizes for a CPU.
PRESETS = {
    "token/countdown3": {"total_steps": 460_800},
    "token/tree": {
        "total_steps": 76_800, "num_envs": 128, "pretraining": 400, "width": 16, "num_blocks": 1, "num_heads": 2,
        "learning_rate": 3e-3, "pretraining_learning_rate": 5e-3,
    },
    # The authors' star graphs, but for the size of the network.
    "paper": {
        "pretraining": 23_400, "pretraining_batch": 256, "pretraining_learning_rate": 2.5e-4, "weight_decay": 0.1,
        "learning_rate": 2.5e-4, "top_k": 10, "width": 128, "num_blocks": 4,
    },
}  # fmt: skip

# -- State ------------------------------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What updates change: `pretrain` the reference, `step` the value."""

    reference: Trained
    value: Trained


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    key: jax.Array


class Memory(NamedTuple):
    """What both networks keep of the tokens so far."""

    reference: Cache
    value: Cache


# -- Guidance and losses ----------------------------------------------------------------------------------------------


def guidance(log_masses: jax.Array, support: jax.Array, eta: float | jax.Array, guide: str) -> jax.Array:
    """What is added to the log probabilities of tokens whose return has the laws `[..., atoms]` on `support`: `[...]`.

    Q* / eta (eq. 2), by logarithms so that masses of 0 and small eta stay finite; or E[R] / eta.
    """
    if guide == "cd":
        return (jnp.exp(log_masses) * support).sum(-1) / eta
    return jax.nn.logsumexp(log_masses + support / eta, axis=-1)


def guided(log_reference: jax.Array, bonus: jax.Array, temperature: float | jax.Array, top_k: int) -> jax.Array:
    """Log probabilities of the guided policy (eq. 1), from those of the reference, both `[..., tokens]`."""
    chex.assert_equal_shape([log_reference, bonus])
    if top_k and top_k < log_reference.shape[-1]:
        least = jax.lax.top_k(log_reference, top_k)[0][..., -1:]
        bonus = jnp.where(log_reference >= least, bonus, -1e9)
    return jax.nn.log_softmax(log_reference / temperature + bonus)


def loss_of(logits: jax.Array, target: jax.Array, counts: jax.Array) -> jax.Array:
    """Cross-entropy (eq. 3) of laws `[batch, tokens, atoms]` to those of their sequences `[batch, atoms]`, mean over
    the tokens that count, `[batch, tokens]`."""
    chex.assert_rank(logits, 3)
    chex.assert_equal_shape([logits[..., 0], counts])
    chex.assert_equal_shape([logits[:, 0], target])
    each = categorical.cross_entropy(target[:, None], logits)
    return (each * counts).sum() / jnp.maximum(counts.sum(), 1)


def imitation_loss(logits: jax.Array, completion: jax.Array, counts: jax.Array) -> jax.Array:
    """Minus the log probability of completions `[batch, tokens]`, mean over the tokens that count, by logits
    `[batch, tokens, vocabulary]`."""
    chex.assert_equal_shape([logits[..., 0], completion, counts])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, completion)
    return (each * counts).sum() / counts.sum()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """Q# on an environment of tokens; called inside the trace, so that the floats of `config` may be tracers."""
    num_tokens, atoms = discrete_action_count(env, env_params), config.num_atoms
    of_tokens = all(hasattr(env, name) for name in ("prompt_length", "completion_length", "demonstrate", "split"))
    require_environment(of_tokens, env, "observations are no tokens", "prompts to complete (jaxrl_dist.envs.tokens)")
    require(
        config.width % config.num_heads == 0,
        f"--num-heads is {config.num_heads}; it must divide --width = {config.width}",
    )
    prompt, places = env.prompt_length, env.completion_length
    sizes = {"width": config.width, "num_blocks": config.num_blocks, "num_heads": config.num_heads}
    reference = Transformer(num_tokens, num_tokens, prompt + places, **sizes)
    value = Transformer(num_tokens, num_tokens * atoms, prompt + places, **sizes)
    support = categorical.support(config.v_min, config.v_max, atoms)
    clock = Clock(1, config.num_envs * places, pretraining=config.pretraining)
    total = max(config.pretraining, 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, min(200, total // 10), total, 0.1)
    imitator = optax.chain(
        optax.clip_by_global_norm(config.gradient_bound),
        optax.adamw(lambda count: config.pretraining_learning_rate * schedule(count), weight_decay=config.weight_decay),
    )
    adam = optax.chain(optax.clip_by_global_norm(config.gradient_bound), optax.adam(config.learning_rate))

    def behind(network: Transformer, parameters: Any, tokens: jax.Array) -> jax.Array:
        """Outputs from which the tokens of completions are predicted, `[batch, completion, ...]`."""
        return network.apply(parameters, tokens[:, :-1])[:, prompt - 1 :]

    def at_tokens(outputs: jax.Array, token: jax.Array) -> jax.Array:
        """Logits of the atoms of tokens `[...]` out of the value network's outputs, `[..., atoms]`."""
        logits = outputs.reshape(*token.shape, num_tokens, atoms)
        return jnp.take_along_axis(logits, token[..., None, None], axis=-2)[..., 0, :]

    def update(trained: Trained, tokens: jax.Array, returns: jax.Array, counts: jax.Array):
        """One gradient step on completed prompts, whose tokens count or do not: the value network, and metrics."""
        # Target: the return itself, on the atoms.
        nothing = jnp.zeros_like(returns), jnp.full((len(returns), atoms), 1 / atoms), support
        target = categorical.project_return(returns, *nothing)

        # Loss: the likelihood of the return behind every token.
        def objective(parameters):
            logits = at_tokens(behind(value, parameters, tokens), tokens[:, prompt:])
            return loss_of(logits, target, counts), (jax.nn.softmax(logits) * support).sum(-1)

        trained, (loss, values, norm) = descend(adam, trained, objective)
        return trained, {
            "loss": average(loss), "value": average(values, counts), "target": average((target * support).sum(-1)),
            "clipped_mass": average(categorical.clipped_mass(returns, *nothing)), "gradient_norm": average(norm),
        }  # fmt: skip

    def init(key: jax.Array) -> State:
        key, reference_key, value_key = jax.random.split(key, 3)
        tokens = jnp.zeros((1, 1), jnp.int32)
        first = begin(imitator, reference.init(reference_key, tokens))
        return State(Learner(first, begin(adam, value.init(value_key, tokens))), key)

    def pretrain(state: State) -> tuple[State, dict[str, Average]]:
        key, batch_key = jax.random.split(state.key)
        keys = jax.random.split(batch_key, config.pretraining_batch)
        start, completion = jax.vmap(env.demonstrate, (0, None))(keys, env_params)
        counts = env.written(completion)

        def objective(parameters):
            logits = behind(reference, parameters, jnp.concatenate([start, completion], axis=1))
            return imitation_loss(logits, completion, counts), logits.argmax(-1) == completion

        learned, (loss, right, _) = descend(imitator, state.learner.reference, objective)
        # The value network is a copy of the last one, but for its outputs.
        own = {"head_kernel": state.learner.value.parameters["params"]["head_kernel"]}
        copy = state.learner.value._replace(parameters={"params": learned.parameters["params"] | own})
        metrics = {"imitation_loss": average(loss), "imitation_accuracy": average(right, counts)}
        return State(Learner(learned, copy), key), metrics

    def step(state: State) -> tuple[State, dict[str, Average]]:
        key, start_key, switch_key, collect_key = jax.random.split(state.key, 4)

        # Rollout: a new prompt in every environment, completed by the reference, at least from some token on.
        both = config.roll_in == "guided"
        remember = start if both else reference.empty
        now = interaction.start(env, env_params, start_key, config.num_envs, remember)
        switch = jax.random.randint(switch_key, (config.num_envs,), 0, places if both else 1)

        def follow(observation: jax.Array, memory: Any, key: jax.Array):
            tokens, count = env.split(observation)
            if both:
                log_reference, log_guided, memory = look(state, memory, observation)
                logits = jnp.where((count - prompt < switch)[:, None], log_guided, log_reference)
            else:
                parameters = state.learner.reference.parameters
                logits, memory = transformer.follow(reference, parameters, memory, tokens, count)
            return jax.random.categorical(key, logits).astype(jnp.int32), memory, ()

        _, (lived, _), _ = rollouts.collect(env, env_params, now, collect_key, places, follow, remember)

        # Of the first episode of each: its return, and the laws behind which all tokens were the reference's. One that
        # a time limit has cut says nothing.
        done = lived.terminated | lived.truncated
        alive = jnp.cumsum(done, axis=0) - done == 0
        returns, lengths = (lived.reward * alive).sum(0), alive.sum(0)
        whole = (lived.terminated & alive).any(0)
        counts = alive.T & whole[:, None] & (jnp.arange(places) >= switch[:, None] - 1)
        tokens = jnp.concatenate([env.split(lived.observation[0])[0][:, :prompt], lived.action.T], axis=1)

        learned, metrics = update(state.learner.value, tokens, returns, counts)
        metrics |= {"episode_return": average(returns), "episode_length": average(lengths)}
        return State(state.learner._replace(value=learned), key), metrics

    def look(state: State, memory: Memory, observation: jax.Array) -> tuple[jax.Array, jax.Array, Memory]:
        """Log probabilities of the next token by the reference and by the guided policy, `[batch, tokens]`."""
        seen, (one, other) = env.split(observation), state.learner
        logits, of_reference = transformer.follow(reference, one.parameters, memory.reference, *seen)
        outputs, of_value = transformer.follow(value, other.parameters, memory.value, *seen)
        log_masses = jax.nn.log_softmax(outputs.reshape(-1, num_tokens, atoms))
        bonus = guidance(log_masses, support, config.eta, config.guide)
        log_reference = jax.nn.log_softmax(logits)
        log_guided = guided(log_reference, bonus, config.temperature, config.top_k)
        return log_reference, log_guided, Memory(of_reference, of_value)

    def start(num_envs: int) -> Memory:
        return Memory(reference.empty(num_envs), value.empty(num_envs))

    def act(state: State, observation: jax.Array, memory: Memory, key: jax.Array) -> tuple[jax.Array, Memory]:
        _, log_guided, memory = look(state, memory, observation)
        action = log_guided.argmax(-1) if config.decoding == "greedy" else jax.random.categorical(key, log_guided)
        return action.astype(jnp.int32), memory

    # The law is claimed of the reference, whose policy needs no memory: it looks at all tokens.
    def complete(state: State, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = reference.apply(state.learner.reference.parameters, *env.split(observation), method="fill")[0]
        return jax.random.categorical(key, logits).astype(jnp.int32), jnp.zeros(len(logits))

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        outputs = value.apply(state.learner.value.parameters, *env.split(observation), method="fill")[0]
        masses = jax.nn.softmax(at_tokens(outputs, action))
        return Law(jnp.broadcast_to(support, masses.shape), masses)

    # Under `vmap` over runs every token would also pass the networks with all before it: see `transformer.follow`.
    claim = Claim(complete, predict, config.discount)
    first = pretrain if config.pretraining else None
    return Agent(init, step, Policy(act, start), clock, claim, pretrain=first, runs_mode="map")


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)
