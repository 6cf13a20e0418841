"""How much better does a policy of tokens get for how far it is led away from its reference? Q# and CD on countdown.

A reference of 0.1 million weights imitates demonstrations of countdown (`envs/tokens.py`) of which three in ten are
solved; a second network of the same size learns the law of what the reference's completions earn, once, and guides it
by Q* / eta (Q#) or the mean over eta (CD), for many eta: `algorithms/sequences/q_sharp.py` with its preset.

`results.csv` has a row per seed, guide and eta: over fresh prompts, each completed several times, the share of
completions that are right (pass@1), of prompts with a right one among all of theirs (pass@k), of well-formed
completions, and the divergence from the reference, the sum over tokens of KL(guided || reference) at what the guided
policy wrote, in nats. An eta of inf is the reference. `summary.csv`: interquartile means over seeds with 95 % bootstrap
intervals, and E[R] - eta KL.

`calibration.csv`: the learned law against what the reference's completions earned, by seed and token: of ten equal
groups by the learned probability of success its mean and the share that succeeded, and how well it ranks them (the
probability that a right completion has the larger one).

    python experiments/guided_decoding/run.py
"""

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro

from jaxrl_dist import envs
from jaxrl_dist.algorithms.sequences import q_sharp
from jaxrl_dist.distributional import categorical, law
from jaxrl_dist.learning import interaction, rollouts
from jaxrl_dist.learning.transformer import Transformer
from jaxrl_dist.records import plotting, recording
from jaxrl_dist.records.statistics import bootstrap_interval, interquartile_mean
from jaxrl_dist.running.problem import split_preset

HERE = Path(__file__).parent
ENV_ID = "token/countdown3"
REFERENCE = 1e6
"""An eta that guides nowhere."""
ETAS = {
    "q_sharp": (REFERENCE, 2.0, 1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02), "cd": (2.0, 1.0, 0.5, 0.3, 0.2, 0.15, 0.1, 0.05),
}  # fmt: skip
LABELS = {"q_sharp": "Q#", "cd": "CD"}

# -- training ---------------------------------------------------------------------------------------------------------


def settings(**changes) -> tuple[q_sharp.Config, int]:
    """The preset's configuration with some changes, and its number of updates after pretraining."""
    of_the_run, of_the_algorithm = split_preset(q_sharp.PRESETS[ENV_ID])
    config = q_sharp.Config(**of_the_algorithm | changes)
    env, _ = envs.make(ENV_ID)
    return config, of_the_run["total_steps"] // (config.num_envs * env.completion_length)


def trainer(config: q_sharp.Config, updates: int):
    """`train(key) -> state, accuracy of imitation, loss of the law`, the latter over the last tenth of each phase."""
    agent = q_sharp.make_agent(config, *envs.make(ENV_ID))

    def phase(step, name, state, length):
        late = length - max(1, length // 10)

        def one(index, carry):
            state, total = carry
            state, metrics = step(state)
            return state, total + jnp.where(index >= late, metrics[name].total / metrics[name].count, 0.0)

        state, total = jax.lax.fori_loop(0, length, one, (state, jnp.float32(0)))
        return state, total / max(1, length - late)

    @jax.jit
    def train(key):
        state, accuracy = phase(agent.pretrain, "imitation_accuracy", agent.init(key), config.pretraining)
        state, loss = phase(agent.step, "loss", state, updates)
        return state, accuracy, loss

    return train


# -- what it is worth -------------------------------------------------------------------------------------------------


def judge(config: q_sharp.Config, state, key: jax.Array, prompts: int, samples: int) -> dict[str, jax.Array]:
    """Rewards, form and divergence of `samples` completions of each of `prompts` prompts, `[prompts, samples]`; learned
    probabilities of success behind every token, and which tokens were written, `[prompts * samples, tokens]`."""
    env, params = envs.make(ENV_ID)
    agent, length = q_sharp.make_agent(config, env, params), env.prompt_length
    start_key, collect_key = jax.random.split(key)
    now = interaction.start(env, params, start_key, prompts, agent.policy.start)
    now = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), now)

    def policy(observation, memory, key):
        return *agent.policy.act(state, observation, memory, key), ()

    _, (lived, _), _ = rollouts.collect(
        env, params, now, collect_key, env.completion_length, policy, agent.policy.start
    )
    completion = lived.action.T
    alive = jnp.cumsum(lived.terminated, axis=0) - lived.terminated == 0
    reward = (lived.reward * alive).sum(0)
    prompt = env.split(lived.observation[0])[0][:, :length]
    written = env.written(completion)
    well_formed = jax.vmap(env.verify)(prompt, jnp.where(written, completion, env.end))[1]

    # All tokens at once, from the same networks.
    sizes = config.width, config.num_blocks, config.num_heads
    outputs = []
    for count, trained in zip((1, config.num_atoms), state.learner, strict=True):
        network = Transformer(env.num_actions, env.num_actions * count, length + env.completion_length, *sizes)
        outputs.append(network.apply(trained.parameters, jnp.concatenate([prompt, completion[:, :-1]], axis=1)))
    log_reference = jax.nn.log_softmax(outputs[0][:, length - 1 :])
    log_masses = outputs[1][:, length - 1 :].reshape(*log_reference.shape, config.num_atoms)
    log_masses, support = jax.nn.log_softmax(log_masses), categorical.support(0.0, 1.0, config.num_atoms)
    bonus = q_sharp.guidance(log_masses, support, config.eta, config.guide)
    log_guided = q_sharp.guided(log_reference, bonus, config.temperature, config.top_k)
    divergence = ((jnp.exp(log_guided) * (log_guided - log_reference)).sum(-1) * written).sum(-1)
    masses = jnp.exp(jnp.take_along_axis(log_masses, completion[..., None, None], axis=2)[:, :, 0])
    return {
        "reward": reward.reshape(prompts, samples), "well_formed": well_formed.reshape(prompts, samples),
        "divergence": divergence.reshape(prompts, samples), "success": law.mean(law.Law(support, masses)),
        "written": written,
    }  # fmt: skip


def row_of(found: dict[str, np.ndarray]) -> dict[str, float]:
    """Of what `judge` found, the numbers of a row of `results.csv`."""
    return {
        "pass_1": found["reward"].mean(), "pass_k": found["reward"].max(1).mean(), "k": found["reward"].shape[1],
        "well_formed": found["well_formed"].mean(), "divergence": found["divergence"].mean(),
    }  # fmt: skip


def calibration_rows(found: dict[str, np.ndarray], groups: int = 10) -> list[dict]:
    """Rows of `calibration.csv`, from completions of the reference."""
    rows, reward = [], found["reward"].ravel()
    for place in range(found["success"].shape[1]):
        there = found["written"][:, place]
        learned, right = found["success"][there, place], reward[there]
        order = np.argsort(learned, kind="stable")
        ranks = pd.Series(learned).rank().to_numpy()
        count = right.sum()
        above = (ranks[right == 1].sum() - count * (count + 1) / 2) / max(1, count * (len(right) - count))
        for group, members in enumerate(np.array_split(order, groups)):
            rows.append({
                "token": place + 1, "group": group, "learned": learned[members].mean(),
                "succeeded": right[members].mean(), "completions": len(members), "ranked": above,
            })  # fmt: skip
    return rows


# -- results ----------------------------------------------------------------------------------------------------------


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Interquartile means over seeds, with 95 % intervals."""
    rows = []
    for (guide, eta), group in results.groupby(["guide", "eta"], sort=False):
        row = {"guide": guide, "eta": eta, "seeds": len(group), "k": group.k.iloc[0]}
        columns = {name: group[name] for name in ("pass_1", "pass_k", "divergence")}
        if np.isfinite(eta):
            columns["objective"] = group.pass_1 - eta * group.divergence
        for name, values in columns.items():
            row[name] = interquartile_mean(values)
            row[f"{name}_low"], row[f"{name}_high"] = bootstrap_interval(values)
        rows.append(row | {"well_formed": interquartile_mean(group.well_formed)})
    return pd.DataFrame(rows).round(4)


def draw(summary: pd.DataFrame, calibration: pd.DataFrame, path: Path) -> None:
    """Pass@1 and pass@k against the divergence, and the learned law against what was earned."""
    figure = plotting._figure(width=11.5, height=3.9)
    one, many, of_law = figure.subplots(1, 3)
    start = summary[np.isinf(summary.eta)]
    for axes, column in ((one, "pass_1"), (many, "pass_k")):
        plotting._style(axes)
        for number, guide in enumerate(LABELS):
            group = pd.concat([start, summary[(summary.guide == guide) & np.isfinite(summary.eta)]])
            group, colour = group.sort_values("eta", ascending=False), plotting.COLOURS[number]
            axes.plot(group.divergence, group[column], "o-", color=colour, linewidth=2.2, label=LABELS[guide])
            axes.vlines(group.divergence, group[f"{column}_low"], group[f"{column}_high"], color=colour, alpha=0.5)
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlim(left=0)
        axes.set_xlabel("KL from the reference, nats")
        axes.set_ylim(bottom=0)
    one.set_ylabel("right completions")
    many.set_ylabel("prompts with a right one")
    one.legend(frameon=False)
    plotting._title(one, "Pass@1", f"countdown, {summary.seeds.max()} seeds, interquartile means")
    plotting._title(many, f"Pass@{summary.k.max()}", f"of {summary.k.max()} completions of each prompt")
    plotting._style(of_law)
    of_law.plot([0, 0.6], [0, 0.6], color=plotting.FAINT, linewidth=1, linestyle="--")
    for number, token in enumerate((1, 3, 5)):
        group = calibration[calibration.token == token].groupby("group")[["learned", "succeeded"]].mean()
        of_law.plot(
            group.learned, group.succeeded, "o-", color=plotting.COLOURS[2 + number], label=f"behind token {token}"
        )
    of_law.set_xlabel("learned probability of success")
    of_law.set_ylabel("share that succeeded")
    of_law.legend(frameon=False)
    plotting._title(of_law, "The learned law", "completions of the reference, in tenths by what was learned")
    plotting._saved(figure, path)


def main(
    num_seeds: int = 5, prompts: int = 256, samples: int = 16, pretraining: int = 3_000, updates: int = 0,
    out: Path = HERE,
) -> None:  # fmt: skip
    """Train all seeds one after another, judge them under every guide and eta, write the tables and the figure.

    Args:
        num_seeds: seeds, each with a reference of its own.
        prompts: prompts on which each is judged, the same for every guide and eta of a seed.
        samples: completions of each prompt; k of pass@k.
        pretraining: updates of the reference.
        updates: updates of the value network; 0: those of the preset.
        out: folder to write to.
    """
    started, rows, calibration = time.perf_counter(), [], []
    out.mkdir(parents=True, exist_ok=True)
    config, own = settings(pretraining=pretraining)
    train = trainer(config, updates or own)
    judges = {
        guide: jax.jit(
            lambda eta, state, key, guide=guide: judge(
                dataclasses.replace(config, eta=eta, guide=guide), state, key, prompts, samples
            )
        )
        for guide in ETAS
    }
    for seed in range(num_seeds):
        train_key, judge_key = jax.random.split(jax.random.key(seed))
        state, accuracy, loss = jax.block_until_ready(train(train_key))
        print(f"seed {seed}: trained at {time.perf_counter() - started:.0f} s", flush=True)
        for guide, etas in ETAS.items():
            for eta in etas:
                key = jax.random.clone(judge_key)  # the same prompts for all
                found = jax.device_get(judges[guide](jnp.float32(eta), state, key))
                shown = np.inf if eta == REFERENCE else eta
                rows.append({"seed": seed, "guide": guide, "eta": shown, **row_of(found)})
                if eta == REFERENCE:
                    calibration += [{"seed": seed, **row} for row in calibration_rows(found)]
                    print(f"imitation accuracy {accuracy:.3f}, loss {loss:.4f}, {row_of(found)}", flush=True)
        results, of_law = pd.DataFrame(rows).round(5), pd.DataFrame(calibration).round(4)
        results.to_csv(out / "results.csv", index=False)
        of_law.to_csv(out / "calibration.csv", index=False)
    summary = summarise(results)
    summary.to_csv(out / "summary.csv", index=False)
    print(summary.to_string(index=False))
    draw(summary, of_law, out / "figure.png")
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
        "date": time.strftime("%Y-%m-%d"), "seeds": num_seeds, "versions": recording.versions(),
        "updates": updates or own, "settings": dataclasses.asdict(config),
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
