"""Gymnasium's MuJoCo tasks, version 5, compiled: the same models, rewards and endings, stepped by MJX.

Published results of TQC, REDQ, TD3 and most others in continuous control are on these tasks; brax's namesakes have
other physics and rewards. The models are the XML files that the package gymnasium ships; observations, rewards, frame
skip, noise of the reset, endings and time limits are those of its version 5, and so are the options' names (ranges as
`healthy_z_range=0.8,2.0`). What a step takes from the simulator is what it holds after the last of its frames, as in
Gymnasium: positions of bodies are those of the last evaluation of the forces, one Runge-Kutta stage behind `qpos`.

What differs:

- Precision. MJX computes in float32, MuJoCo in float64. Contacts are stiff, so trajectories part there in the end
  (`experiments/mujoco_physics` measures how far).
- Humanoid and HumanoidStandup ask for the solver PGS, which MJX lacks: they take Newton.
- After a reset the solver starts from zero rather than from the resting accelerations, which changes its result within
  its tolerance; forces that are observed (`qfrc_constraint` of InvertedDoublePendulum) are 0 in the first observation.
- Where MuJoCo resets a simulation that diverges, MJX goes on with numbers that are not finite. InvertedPendulum and Ant
  end there, as in Gymnasium; elsewhere training stops and says so.

A step takes 20 to 80 s to compile on two cores.
"""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

from jaxrl_dist.envs.automatic_reset import ResetWhereEnded
from jaxrl_dist.envs.quiet import without_warp_lines

with without_warp_lines():
    import mujoco
    from mujoco import mjx

# -- Parameters -------------------------------------------------------------------------------------------------------


@struct.dataclass
class Params(environment.EnvParams):
    max_steps_in_episode: int = 1000


@struct.dataclass
class Running(Params):
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.1
    reset_noise_scale: float = 0.1


@struct.dataclass
class HopperParams(Running):
    ctrl_cost_weight: float = 1e-3
    reset_noise_scale: float = 5e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_state_range: tuple = (-100.0, 100.0)
    healthy_z_range: tuple = (0.7, float("inf"))
    healthy_angle_range: tuple = (-0.2, 0.2)


@struct.dataclass
class Walker2dParams(Running):
    ctrl_cost_weight: float = 1e-3
    reset_noise_scale: float = 5e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: tuple = (0.8, 2.0)
    healthy_angle_range: tuple = (-1.0, 1.0)


@struct.dataclass
class SwimmerParams(Running):
    ctrl_cost_weight: float = 1e-4


@struct.dataclass
class AntParams(Running):
    ctrl_cost_weight: float = 0.5
    contact_cost_weight: float = 5e-4
    contact_force_range: tuple = (-1.0, 1.0)
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: tuple = (0.2, 1.0)


@struct.dataclass
class HumanoidParams(Running):
    forward_reward_weight: float = 1.25
    contact_cost_weight: float = 5e-7
    contact_cost_range: tuple = (-float("inf"), 10.0)
    healthy_reward: float = 5.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: tuple = (1.0, 2.0)
    reset_noise_scale: float = 1e-2


@struct.dataclass
class HumanoidStandupParams(Params):
    uph_cost_weight: float = 1.0
    ctrl_cost_weight: float = 0.1
    impact_cost_weight: float = 0.5e-6
    impact_cost_range: tuple = (-float("inf"), 10.0)
    reset_noise_scale: float = 1e-2


@struct.dataclass
class ReacherParams(Params):
    max_steps_in_episode: int = 50
    reward_dist_weight: float = 1.0
    reward_control_weight: float = 1.0


@struct.dataclass
class PusherParams(Params):
    max_steps_in_episode: int = 100
    reward_near_weight: float = 0.5
    reward_dist_weight: float = 1.0
    reward_control_weight: float = 0.1


@struct.dataclass
class InvertedPendulumParams(Params):
    reset_noise_scale: float = 0.01


@struct.dataclass
class InvertedDoublePendulumParams(Params):
    healthy_reward: float = 10.0
    reset_noise_scale: float = 0.1


# -- What all tasks share ---------------------------------------------------------------------------------------------


@struct.dataclass
class MujocoState(environment.EnvState):
    """What a simulation goes on from; all else follows from it."""

    time: jax.Array  # steps since the reset
    qpos: jax.Array
    qvel: jax.Array
    warmstart: jax.Array  # accelerations from which the constraint solver starts
    place: jax.Array  # where the body was whose speed pays, [2]


def _within(value: jax.Array, bounds: tuple) -> jax.Array:
    return (bounds[0] < value) & (value < bounds[1])


class Task(ResetWhereEnded):
    """One task: `model` and `frame_skip`, and four functions of the simulator's data.

    `start` draws `qpos` and `qvel`; `observe` and `place` read the data; `outcome` gives `(reward, terminated)`, from
    the place before the step and `speed`, metres per second since then.
    """

    model_file: str
    frame_skip: int
    parameters: type = Params
    kinematics = False  # whether the first observation needs positions of bodies, inertias or velocities
    contact_forces = False  # whether `cfrc_ext` is read
    normal_velocities = False  # whether a reset's noise on velocities is normal, not uniform

    def __init__(self) -> None:
        super().__init__()
        self.mujoco_model = mujoco.MjModel.from_xml_path(str(assets() / self.model_file))
        if self.mujoco_model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
            self.mujoco_model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
        self.model = mjx.put_model(self.mujoco_model, impl="jax")
        self.data = mjx.make_data(self.mujoco_model, impl="jax")
        self.step_seconds = float(self.mujoco_model.opt.timestep) * self.frame_skip

    # The task.

    def start(self, key: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        """Noise on positions and velocities."""
        key_position, key_velocity = jax.random.split(key)
        scale = params.reset_noise_scale
        noise = partial(jax.random.uniform, minval=-scale, maxval=scale)
        qpos = self.data.qpos + noise(key_position, self.data.qpos.shape)
        if self.normal_velocities:
            return qpos, scale * jax.random.normal(key_velocity, self.data.qvel.shape)
        return qpos, noise(key_velocity, self.data.qvel.shape)

    def observe(self, data: mjx.Data, params: Any) -> jax.Array:
        return jnp.concatenate([data.qpos, data.qvel])

    def place(self, data: mjx.Data) -> jax.Array:
        return data.qpos[:2]

    def outcome(self, speed: jax.Array, data: mjx.Data, action: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        raise NotImplementedError

    def body(self, data: mjx.Data, name: str) -> jax.Array:
        """Where a body is, [3]."""
        return data.xpos[mujoco.mj_name2id(self.mujoco_model, mujoco.mjtObj.mjOBJ_BODY, name)]

    # The environment.

    @property
    def name(self) -> str:
        return f"mujoco/{type(self).__name__}-v5"

    @property
    def default_params(self) -> Params:
        return self.parameters()

    @property
    def num_actions(self) -> int:
        return self.mujoco_model.nu

    def action_space(self, params: Params | None = None) -> spaces.Box:
        low, high = self.mujoco_model.actuator_ctrlrange.astype(np.float32).T
        return spaces.Box(low, high, low.shape)

    def observation_space(self, params: Params | None = None) -> spaces.Box:
        seen = jax.eval_shape(self.observe, self.data, self.default_params)
        return spaces.Box(-np.inf, np.inf, seen.shape, seen.dtype)

    def reset_env(self, key: jax.Array, params: Any) -> tuple[jax.Array, MujocoState]:
        qpos, qvel = self.start(key, params)
        data = self.data.replace(qpos=qpos, qvel=qvel)
        if self.kinematics:
            data = mjx.com_vel(self.model, mjx.com_pos(self.model, mjx.kinematics(self.model, data)))
        return self.observe(data, params), self._state(data, jnp.zeros((), jnp.int32))

    def step_env(
        self, key: jax.Array, state: MujocoState, action: jax.Array, params: Any
    ) -> tuple[jax.Array, MujocoState, jax.Array, jax.Array, dict[str, Any]]:
        data = self.data.replace(qpos=state.qpos, qvel=state.qvel, qacc_warmstart=state.warmstart, ctrl=action)
        data, _ = jax.lax.scan(lambda now, _: (mjx.step(self.model, now), None), data, length=self.frame_skip)
        if self.contact_forces:
            data = mjx.rne_postconstraint(self.model, data)
        successor = self._state(data, state.time + 1)
        speed = (successor.place - state.place) / self.step_seconds
        reward, terminated = self.outcome(speed, data, action, params)
        return self.observe(data, params), successor, reward, jnp.asarray(terminated), {}

    def _state(self, data: mjx.Data, time: jax.Array) -> MujocoState:
        return MujocoState(
            time=time, qpos=data.qpos, qvel=data.qvel, warmstart=data.qacc_warmstart, place=self.place(data)
        )


def assets() -> Path:
    """Folder of the XML files, found without importing Gymnasium's own environments (which import a video writer)."""
    return Path(importlib.util.find_spec("gymnasium").submodule_search_locations[0], "envs", "mujoco", "assets")


# -- The tasks --------------------------------------------------------------------------------------------------------


class Runner(Task):
    """Observes `qpos` without the first `hidden` (where it is along its way) and `qvel`, and is paid for its speed."""

    hidden = 1

    def __init__(self, exclude_current_positions_from_observation: bool = True) -> None:
        super().__init__()
        self.skipped = self.hidden if exclude_current_positions_from_observation else 0

    def observe(self, data: mjx.Data, params: Any) -> jax.Array:
        return jnp.concatenate([data.qpos[self.skipped :], data.qvel])

    def run(self, speed: jax.Array, action: jax.Array, params: Any) -> jax.Array:
        return params.forward_reward_weight * speed[0] - params.ctrl_cost_weight * jnp.sum(action**2)

    def outcome(self, speed: jax.Array, data: mjx.Data, action: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        return self.run(speed, action, params), False


class HalfCheetah(Runner):
    model_file, frame_skip, parameters, normal_velocities = "half_cheetah.xml", 5, Running, True


class Swimmer(Runner):
    model_file, frame_skip, parameters, hidden = "swimmer.xml", 4, SwimmerParams, 2


class Upright(Runner):
    """One that is paid for being healthy, too, and ends where it is not."""

    def healthy(self, data: mjx.Data, params: Any) -> jax.Array:
        raise NotImplementedError

    def outcome(self, speed: jax.Array, data: mjx.Data, action: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        healthy = self.healthy(data, params)
        reward = self.run(speed, action, params) + params.healthy_reward * healthy
        return reward, ~healthy & params.terminate_when_unhealthy


class Walker2d(Upright):
    model_file, frame_skip, parameters = "walker2d_v5.xml", 4, Walker2dParams

    def observe(self, data: mjx.Data, params: Any) -> jax.Array:
        return jnp.concatenate([data.qpos[self.skipped :], jnp.clip(data.qvel, -10, 10)])

    def healthy(self, data: mjx.Data, params: Any) -> jax.Array:
        return _within(data.qpos[1], params.healthy_z_range) & _within(data.qpos[2], params.healthy_angle_range)


class Hopper(Walker2d):
    model_file, frame_skip, parameters = "hopper.xml", 4, HopperParams

    def healthy(self, data: mjx.Data, params: Any) -> jax.Array:
        rest = jnp.concatenate([data.qpos, data.qvel])[2:]
        return super().healthy(data, params) & jnp.all(_within(rest, params.healthy_state_range))


class Ant(Upright):
    model_file, frame_skip, parameters, hidden = "ant.xml", 5, AntParams, 2
    kinematics = contact_forces = normal_velocities = True

    def __init__(
        self, exclude_current_positions_from_observation: bool = True, include_cfrc_ext_in_observation: bool = True
    ) -> None:
        super().__init__(exclude_current_positions_from_observation)
        self.shows_forces = include_cfrc_ext_in_observation

    def forces(self, data: mjx.Data, params: Any) -> jax.Array:
        return jnp.clip(data._impl.cfrc_ext, *params.contact_force_range)

    def observe(self, data: mjx.Data, params: Any) -> jax.Array:
        forces = [self.forces(data, params)[1:].ravel()] if self.shows_forces else []
        return jnp.concatenate([super().observe(data, params), *forces])

    def place(self, data: mjx.Data) -> jax.Array:
        return self.body(data, "torso")[:2]

    def healthy(self, data: mjx.Data, params: Any) -> jax.Array:
        low, high = params.healthy_z_range
        finite = jnp.all(jnp.isfinite(data.qpos)) & jnp.all(jnp.isfinite(data.qvel))
        return finite & (low <= data.qpos[2]) & (data.qpos[2] <= high)

    def outcome(self, speed: jax.Array, data: mjx.Data, action: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        reward, terminated = super().outcome(speed, data, action, params)
        return reward - params.contact_cost_weight * jnp.sum(self.forces(data, params) ** 2), terminated


class Humanoid(Upright):
    model_file, frame_skip, parameters, hidden = "humanoid.xml", 5, HumanoidParams, 2
    kinematics = contact_forces = True

    def __init__(
        self, exclude_current_positions_from_observation: bool = True, include_cinert_in_observation: bool = True,
        include_cvel_in_observation: bool = True, include_qfrc_actuator_in_observation: bool = True,
        include_cfrc_ext_in_observation: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(exclude_current_positions_from_observation)
        self.shows = (
            include_cinert_in_observation, include_cvel_in_observation, include_qfrc_actuator_in_observation,
            include_cfrc_ext_in_observation,
        )  # fmt: skip

    def observe(self, data: mjx.Data, params: Any) -> jax.Array:
        more = (data._impl.cinert[1:], data.cvel[1:], data.qfrc_actuator[6:], data._impl.cfrc_ext[1:])
        shown = [values.ravel() for values, is_shown in zip(more, self.shows, strict=True) if is_shown]
        return jnp.concatenate([super().observe(data, params), *shown])

    def place(self, data: mjx.Data) -> jax.Array:
        """The centre of mass."""
        mass = self.mujoco_model.body_mass.astype(np.float32)
        return (mass @ data.xipos / mass.sum())[:2]

    def healthy(self, data: mjx.Data, params: Any) -> jax.Array:
        return _within(data.qpos[2], params.healthy_z_range)

    def outcome(self, speed: jax.Array, data: mjx.Data, action: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        reward, terminated = super().outcome(speed, data, action, params)
        cost = params.contact_cost_weight * jnp.sum(data._impl.cfrc_ext**2)
        return reward - jnp.clip(cost, *params.contact_cost_range), terminated


class HumanoidStandup(Humanoid):
    model_file, parameters = "humanoidstandup.xml", HumanoidStandupParams

    def outcome(self, speed: jax.Array, data: mjx.Data, action: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        # Gymnasium takes uph_cost_weight and does not use it.
        risen = params.uph_cost_weight * data.qpos[2] / self.mujoco_model.opt.timestep
        impact = jnp.clip(params.impact_cost_weight * jnp.sum(data._impl.cfrc_ext**2), *params.impact_cost_range)
        return risen - params.ctrl_cost_weight * jnp.sum(action**2) - impact + 1.0, False


class Reacher(Task):
    model_file, frame_skip, parameters, kinematics = "reacher.xml", 2, ReacherParams, True

    def start(self, key: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        """A goal uniform on a disk of radius 0.2."""
        key_radius, key_angle, key_position, key_velocity = jax.random.split(key, 4)
        radius = 0.2 * jnp.sqrt(jax.random.uniform(key_radius))
        angle = jax.random.uniform(key_angle, maxval=2 * jnp.pi)
        goal = radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        qpos = self.data.qpos + jax.random.uniform(key_position, self.data.qpos.shape, minval=-0.1, maxval=0.1)
        qvel = jax.random.uniform(key_velocity, self.data.qvel.shape, minval=-0.005, maxval=0.005)
        return qpos.at[-2:].set(goal), qvel.at[-2:].set(0.0)

    def reach(self, data: mjx.Data) -> jax.Array:
        return self.body(data, "fingertip") - self.body(data, "target")

    def observe(self, data: mjx.Data, params: Any) -> jax.Array:
        angles = data.qpos[:2]
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles), data.qpos[2:], data.qvel[:2], self.reach(data)[:2]])

    def outcome(self, speed: jax.Array, data: mjx.Data, action: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        distance, effort = jnp.linalg.norm(self.reach(data)), jnp.sum(action**2)
        return -params.reward_dist_weight * distance - params.reward_control_weight * effort, False


class Pusher(Task):
    model_file, frame_skip, parameters, kinematics = "pusher_v5.xml", 5, PusherParams, True

    def start(self, key: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        """An object uniform in a box, drawn again until it is more than 0.17 away from the goal."""
        key_object, key_velocity = jax.random.split(key)

        def draw(carry: tuple) -> tuple:
            key, now = jax.random.split(carry[0])
            return key, jax.random.uniform(now, (2,), minval=jnp.array([-0.3, -0.2]), maxval=jnp.array([0.0, 0.2]))

        _, there = jax.lax.while_loop(lambda c: jnp.linalg.norm(c[1]) <= 0.17, draw, draw((key_object, None)))
        qvel = jax.random.uniform(key_velocity, self.data.qvel.shape, minval=-0.005, maxval=0.005)
        qpos = self.data.qpos.at[-4:].set(jnp.concatenate([there, jnp.zeros(2)]))
        return qpos, qvel.at[-4:].set(0.0)

    def observe(self, data: mjx.Data, params: Any) -> jax.Array:
        bodies = [self.body(data, name) for name in ("tips_arm", "object", "goal")]
        return jnp.concatenate([data.qpos[:7], data.qvel[:7], *bodies])

    def outcome(self, speed: jax.Array, data: mjx.Data, action: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        thing = self.body(data, "object")
        near = jnp.linalg.norm(thing - self.body(data, "tips_arm"))
        distance = jnp.linalg.norm(thing - self.body(data, "goal"))
        cost = params.reward_near_weight * near + params.reward_dist_weight * distance
        return -cost - params.reward_control_weight * jnp.sum(action**2), False


class InvertedPendulum(Task):
    model_file, frame_skip, parameters = "inverted_pendulum.xml", 2, InvertedPendulumParams

    def outcome(self, speed: jax.Array, data: mjx.Data, action: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        seen = self.observe(data, params)
        fallen = ~jnp.all(jnp.isfinite(seen)) | (jnp.abs(seen[1]) > 0.2)
        return 1.0 - fallen, fallen


class InvertedDoublePendulum(Task):
    model_file, frame_skip, parameters = "inverted_double_pendulum.xml", 5, InvertedDoublePendulumParams
    normal_velocities = True

    def observe(self, data: mjx.Data, params: Any) -> jax.Array:
        angles = data.qpos[1:]
        forces = jnp.clip(data.qfrc_constraint, -10, 10)[:1]
        return jnp.concatenate([data.qpos[:1], jnp.sin(angles), jnp.cos(angles), jnp.clip(data.qvel, -10, 10), forces])

    def outcome(self, speed: jax.Array, data: mjx.Data, action: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        x, _, y = data.site_xpos[0]
        fallen = y <= 1
        astray = 0.01 * x**2 + (y - 2) ** 2
        haste = 1e-3 * data.qvel[1] ** 2 + 5e-3 * data.qvel[2] ** 2
        return params.healthy_reward * ~fallen - astray - haste, fallen


TASKS = {
    f"{task.__name__}-v5": task
    for task in (
        Ant, HalfCheetah, Hopper, Humanoid, HumanoidStandup, InvertedDoublePendulum, InvertedPendulum, Pusher,
        Reacher, Swimmer, Walker2d,
    )
}  # fmt: skip
