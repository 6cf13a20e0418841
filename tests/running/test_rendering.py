"""Films of saved runs: what is played, what is written under it, and the files."""

import base64
import io
import itertools
import json
import re

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from toys import Toy, ToyParams

from jaxrl_dist import cli, envs
from jaxrl_dist.agent import Agent, Claim, Clock, memoryless
from jaxrl_dist.algorithms.value_based import qr_dqn
from jaxrl_dist.distributional.law import Law, equally_weighted
from jaxrl_dist.envs.bridge import Bridge
from jaxrl_dist.records import films
from jaxrl_dist.running import evaluation, interactive, problem, rendering, results, session
from jaxrl_dist.running.rendering import Options

SMALL = qr_dqn.Config(
    num_envs=2, warmup_steps=32, batch_size=16, replay_capacity=64, hidden=(8,), exploration_steps=40, num_quantiles=5,
    discount=0.9,
)  # fmt: skip


@pytest.fixture(scope="module")
def bridge_run(tmp_path_factory):
    """QR-DQN on the bridge, seeds 3 and 4: five quantiles, all but untrained."""
    options = problem.RunOptions(
        env_id="bridge", num_seeds=2, seed=3, total_steps=48, eval_episodes=2, eval_states=2, eval_rollouts=2,
        device="cpu", plots=False, name="run", runs_folder=str(tmp_path_factory.mktemp("runs")),
    )  # fmt: skip
    return session.train(problem.prepare("qr_dqn", qr_dqn.make_agent, SMALL, options), Console(file=io.StringIO()))


@pytest.fixture
def one_process(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "spread_over_cores", lambda most=None: None)
    monkeypatch.chdir(tmp_path)


# -- what is played ---------------------------------------------------------------------------------------------------


def scripted(gamma=0.5, quantiles=(0.0, 1.0), bonus=0.0):
    """An agent on CartPole that always pushes to the right, and believes that every return is `quantiles`."""
    act = lambda state, observation, key: jnp.ones(len(observation), jnp.int32)  # noqa: E731
    law = lambda state, observation, action: equally_weighted(  # noqa: E731
        jnp.broadcast_to(jnp.array(quantiles), (len(observation), len(quantiles)))
    )
    claim = Claim(
        lambda state, observation, key: (act(state, observation, key), jnp.full(len(observation), bonus)), law, gamma
    )
    return Agent(None, None, memoryless(act), Clock(1, 1), claim)


def played(agent, env_id="CartPole-v1", limit=None, options=None, **changes):
    env, params = envs.make(env_id, **changes)
    options = options or Options()
    limit = limit or evaluation.episode_limit(params)
    return rendering.player(agent, env, params, options, limit=limit)((), jax.random.key(7))


def test_the_return_that_followed_is_the_discounted_sum_by_hand():
    reward, bonus = np.array([1.0, -2.0, 4.0]), np.array([10.0, 20.0, 40.0])
    np.testing.assert_allclose(rendering.returns_of(reward, 0 * bonus, 0.5), [1 - 1 + 1, -2 + 2, 4])
    # Of an action the bonus of its own step is no part, of a state it is.
    np.testing.assert_allclose(rendering.returns_of(reward, bonus, 0.5), [1 + 9 + 11, -2 + 22, 4])
    np.testing.assert_allclose(rendering.returns_of(reward, bonus, 0.5, of_states=True), [11 + 9 + 11, 18 + 22, 44])


def test_an_episode_is_that_of_the_evaluation_to_its_very_end():
    (found,) = played(scripted(), options=Options())
    episode = found.episode
    env, params = envs.make("CartPole-v1")
    judged = evaluation.evaluate(scripted(), env, params, (), jax.random.key(7), episodes=1, max_steps=500)
    steps = int(judged.episode_length[0])
    assert 5 < steps < 15
    assert (len(episode.reward), episode.reward.sum()) == (steps, float(judged.episode_return[0]))
    assert episode.end == "ended"
    # One picture more than steps: the pole has fallen in the last one, and in no other.
    theta = episode.states.theta
    assert episode.pictures == len(theta) == steps + 1
    assert abs(theta[-1]) > params.theta_threshold_radians >= abs(theta[:-1]).max()
    np.testing.assert_array_equal(found.observations[:, 2], theta)
    np.testing.assert_allclose(episode.followed, 2 - 0.5 ** np.arange(steps - 1, -1, -1.0), rtol=1e-6)
    assert episode.seen.all()
    np.testing.assert_array_equal(episode.predicted.atoms, np.tile([0.0, 1.0], (steps, 1)))
    assert found.other == 0


def test_beyond_what_is_shown_returns_go_on():
    """Both where pictures are cut and where the time limit is; a return is known but for a hundredth of its weight."""
    whole = played(scripted(0.9))[0].episode
    cut = played(scripted(0.9), options=Options(max_steps=4))[0].episode
    assert (len(cut.reward), cut.pictures, cut.end) == (4, 5, "cut short")
    np.testing.assert_allclose(cut.followed, whole.followed[:4])
    short = played(scripted(0.9), max_steps_in_episode=4)[0].episode
    assert (len(short.reward), short.pictures, short.end) == (4, 5, "time limit")
    np.testing.assert_allclose(short.followed, whole.followed[:4])


def test_where_the_time_limit_cannot_be_lifted_marks_are_hollow():
    """The chain shows the share of its limit that is over."""
    (found,) = played(scripted(0.1), "DiscountingChain-bsuite", max_steps_in_episode=5)
    episode = found.episode
    assert (len(episode.reward), episode.end) == (5, "time limit")
    # The second choice pays after three steps, and the marks know but for 0.1 per step that is left.
    np.testing.assert_allclose(episode.followed, [0.01, 0.1, 1, 0, 0])
    np.testing.assert_allclose(found.missing, 0.1 ** np.arange(5, 0, -1.0))
    np.testing.assert_array_equal(episode.seen, [True, True, True, True, False])


def test_the_best_and_the_worst_of_several_are_chosen_by_their_returns():
    env, params = envs.make("CartPole-v1")
    returns = evaluation.evaluate(scripted(), env, params, (), jax.random.key(7), episodes=6, max_steps=500)
    returns = np.asarray(returns.episode_return)
    for which, expected in (("best", returns.max()), ("worst", returns.min()), ("median", np.sort(returns)[2])):
        (found,) = played(scripted(), options=Options(episodes=6, episode=which))
        assert found.episode.reward.sum() == expected, which
    everything = played(scripted(), options=Options(episodes=6))
    np.testing.assert_array_equal([found.episode.reward.sum() for found in everything], returns)


def test_a_claim_about_another_policy_is_noticed_and_can_be_shown():
    paid = scripted(0.5, bonus=0.25)
    assert played(paid)[0].other == 1
    (found,) = played(paid, options=Options(explore=True))
    assert found.other == 0
    # Each later step is worth 1.25.
    steps = np.arange(len(found.episode.reward) - 1, -1, -1.0)
    np.testing.assert_allclose(found.episode.followed, 1 + 1.25 * (1 - 0.5**steps), rtol=1e-6)


def test_a_policy_that_remembers_and_claims_nothing_is_played():
    env, params = Toy(), ToyParams()
    agent = kinds.make_on_policy(kinds.OnPolicyConfig(), env, params)
    state = agent.init(jax.random.key(0))
    play = rendering.player(agent, env, params, Options(), limit=9)
    (found,) = play(state, jax.random.key(1))
    judged = evaluation.evaluate(agent, env, params, state, jax.random.key(1), episodes=1, max_steps=9)
    assert found.episode.predicted is None
    np.testing.assert_allclose(found.episode.reward.sum(), judged.episode_return[0], rtol=1e-6)
    with pytest.raises(ValueError, match="--explore is for agents that make a claim"):
        rendering.player(agent, env, params, Options(explore=True), limit=9)


# -- how it is drawn --------------------------------------------------------------------------------------------------


def test_quantiles_of_laws_by_hand():
    law = Law(np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 9.0]]), np.array([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]]))
    np.testing.assert_array_equal(films.quantiles(law, (0.1, 0.5, 0.9)), [[1, 1, 3], [5, 5, 5]])


def test_the_shape_of_a_law_is_where_its_mass_is():
    places, heights = films.shape_of(np.array([2.0, 8.0]), np.array([0.25, 0.75]), 0.0, 10.0)
    assert abs(places[heights.argmax()] - 8) < 0.1
    near = lambda value: heights[np.abs(places - value).argmin()]  # noqa: E731
    np.testing.assert_allclose(near(2.0) / near(8.0), 1 / 3, rtol=0.05)
    assert near(5.0) < 1e-6


def film_of(*lengths, **changes):
    """Seeds whose episodes have so many steps, each picture of another shade."""
    scene = []
    for steps in lengths:
        law = equally_weighted(np.linspace(0, 1, 4) + np.zeros((steps, 1)))
        scene.append(
            films.Episode(
                np.arange(steps + 1), np.ones(steps), Law(*map(np.asarray, law)), np.linspace(1, 0, steps),
                np.ones(steps, bool), "ended",
            )
        )  # fmt: skip
    picture = lambda step: np.full((30, 40, 3), 10 * step, np.uint8)  # noqa: E731
    names = tuple(f"seed {seed}" for seed in range(len(lengths)))
    return films.Film("X on Y", "note", names, [scene, scene], ("episode 1", "episode 2"), picture)._replace(**changes)


def test_a_film_shows_every_step_and_who_has_ended_waits():
    stage = films.Stage(film_of(3, 5))
    moments = stage.moments()
    assert [moment.step for moment in moments] == [*range(6), *range(6)]
    assert [moment.scene for moment in moments] == [0] * 6 + [1] * 6
    picture = np.asarray(stage.draw(moments[5]))
    assert picture.shape[1::-1] == stage.size
    shades = {shade for shade in np.unique(picture.reshape(-1, 3), axis=0)[:, 0].tolist() if shade % 10 == 0}
    assert {30, 50} <= shades
    every = films.Stage(film_of(3, 5, every=3)).moments()
    assert [moment.step for moment in every] == [0, 3, 5] * 2
    # An end stays longer.
    assert films.seconds(stage)[5] > films.seconds(stage)[4] + 1


def test_seeds_stand_side_by_side_and_scale_makes_them_larger():
    one, two = (films.Stage(film_of(*[2] * seeds)) for seeds in (1, 2))
    assert two.size == (2 * one.size[0], one.size[1])
    large = films.Stage(film_of(2, scale=2.0))
    assert large.size == (2 * one.size[0], 2 * one.size[1])
    five = films.Stage(film_of(*[2] * 5))
    assert five.size[0] == 4 * one.size[0]
    assert five.size[1] > 1.5 * one.size[1]


def test_what_lies_under_a_picture_depends_on_what_was_predicted_and_what_followed():
    film = film_of(4)
    drawn = {}
    for name, change in {
        "as it is": {},
        "another law": {"predicted": Law(film.scenes[0][0].predicted.atoms[:, ::-1] ** 2, np.full((4, 4), 0.25))},
        "another return": {"followed": np.array([0.2, 0.9, 0.5, 0.0])},
        "not known": {"seen": np.zeros(4, bool)},
    }.items():
        scene = [[film.scenes[0][0]._replace(**change)]]
        stage = films.Stage(film._replace(scenes=scene, labels=("episode 1",)))
        drawn[name] = np.asarray(stage.draw(stage.moments()[2])).tobytes()
    assert len(set(drawn.values())) == len(drawn)


# -- files ------------------------------------------------------------------------------------------------------------


def render(*words, capsys):
    cli.command(["render", *map(str, words)])
    return capsys.readouterr().out


def test_a_gif_has_a_picture_for_each_step_and_says_what_the_evaluation_finds(
    bridge_run, one_process, tmp_path, capsys
):
    said = render(bridge_run, "--out", "a.gif", "--seed", 5, capsys=capsys)
    _, returns, _ = results.evaluate_run(bridge_run, cli.find_algorithm, episodes=1, seed=5)
    found = re.findall(r"seed (\d), episode 1: return (\S+) in (\d+) steps?, (ended|time limit)", said)
    assert [int(seed) for seed, *_ in found] == [3, 4]
    np.testing.assert_allclose([float(value) for _, value, *_ in found], returns[:, 0], atol=0.051)
    steps = max(int(count) for _, _, count, _ in found)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == steps + 1
        assert gif.info["loop"] == 0
        pictures = []
        for index in range(gif.n_frames):
            gif.seek(index)
            pictures.append(np.asarray(gif.convert("RGB")))
    assert all((one != other).any() for one, other in itertools.pairwise(pictures))
    render(bridge_run, "--out", "again.gif", "--seed", 5, capsys=capsys)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "again.gif").read_bytes()


def test_a_page_holds_all_its_pictures_and_needs_no_network(bridge_run, one_process, tmp_path, capsys):
    said = render(bridge_run, "--out", "a.html", "--seeds", 4, "--episodes", 2, capsys=capsys)
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=\"(?!data)", page)
    assert "QR-DQN on bridge" in page
    pictures = json.loads(re.search(r"const pictures = (\[.*?\])", page)[1])
    milliseconds = json.loads(re.search(r"const milliseconds = (\[.*?\])", page)[1])
    steps = [int(count) for count in re.findall(r"in (\d+) steps?,", said)]
    assert len(pictures) == len(milliseconds) == sum(steps) + 2
    assert f"wrote a.html ({len(pictures)} pictures" in said
    sizes = {Image.open(io.BytesIO(base64.b64decode(data))).size for data in pictures}
    assert len(sizes) == 1


def test_a_film_in_mp4_is_written_where_its_package_is_there(bridge_run, one_process, tmp_path, capsys, monkeypatch):
    reader = pytest.importorskip("imageio_ffmpeg", reason="the extra `video` is not installed")
    render(bridge_run, "--out", "a.mp4", "--seeds", 3, capsys=capsys)
    count, seconds = reader.count_frames_and_secs(str(tmp_path / "a.mp4"))
    assert count > 2
    assert seconds > 1
    monkeypatch.setattr(rendering.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        cli.command(["render", str(bridge_run), "--out", "b.mp4"])
    assert "pip install 'jaxrl-dist[video]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("RUN --out a.png", "--out is a.png; it must end with .gif, .html or .mp4"),
        ("RUN --out nowhere/a.gif", "--out is nowhere/a.gif; it must be a file in a folder that exists"),
        ("nowhere --out a.gif", "run folder nowhere does not exist"),
        (". --out a.gif", "config.json does not exist: no run folder"),
        ("RUN --out a.gif --seeds 3 7", "--seeds has 7; the run holds the seeds [3, 4]"),
        ("RUN --out a.gif --seeds 3 3", "--seeds has [3] twice"),
        ("RUN --out a.gif --episode best", "--episode is best, of one; --episodes says of how many"),
        ("RUN --out a.gif --episode good", "--episode"),
        ("RUN --out a.gif --episodes 0", "--episodes is 0; it must be a whole number in [1,"),
        ("RUN --out a.gif --fps 100", "--fps is 100; it must be in (0, 50]"),
        ("RUN --out a.gif --scale 0", "--scale is 0; it must be in [0.25, 4]"),
        ("RUN --out a.gif --policy best", "kept its last policies only; --keep-best True keeps both"),
        ("RUN --out a.gif --viewer", "brax's page (--viewer) must end with .html"),
        ("RUN --out a.html --viewer", "--viewer is brax's page, for its environments with bodies; this one is bridge"),
        ("RUN --out a.gif --mujoco", "--mujoco is for bodies of MuJoCo, which bridge has not"),
        ("RUN", "the following arguments are required: --out"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(bridge_run, one_process, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        cli.command(["render", *words.replace("RUN", str(bridge_run)).split()])
    captured = capsys.readouterr()
    (said,) = captured.err.splitlines()
    assert said.startswith("error: ")
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_without_a_drawing_it_is_said_what_to_write(bridge_run, tmp_path, one_process, capsys, monkeypatch):
    monkeypatch.delattr(Bridge, "picture")
    with pytest.raises(SystemExit, match="2"):
        cli.command(["render", str(bridge_run), "--out", "a.gif"])
    assert "bridge has no drawing: give its class a method picture(self, state, params)" in capsys.readouterr().err
    assert not (tmp_path / "a.gif").exists()
    assert "wrote a.gif" in render(bridge_run, "--out", "a.gif", "--observations", capsys=capsys)


def test_a_notebook_shows_a_run_in_one_line(bridge_run, capsys):
    pytest.importorskip("IPython")
    shown = interactive.show(bridge_run, seeds=[3], max_steps=2)
    assert shown.data.startswith("<div><iframe srcdoc=")
    assert shown.data.count("data:image/png") == 1  # in the script that shows all of them
    assert "seed 3, episode 1: return" in capsys.readouterr().out
    with pytest.raises(ValueError, match="episde is no option of show; did you mean episode"):
        interactive.show(bridge_run, episde=3)


def test_options_of_the_command_are_those_of_python(capsys):
    with pytest.raises(SystemExit):
        cli.command(["render", "--help"])
    said = capsys.readouterr().out
    for name in Options._fields:
        assert f"--{name.replace('_', '-')}" in said
