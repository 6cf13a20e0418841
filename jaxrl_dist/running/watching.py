"""What is watched while runs train: those that break, values beyond what is possible, estimates that are cut short."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl_dist.agent import Agent
from jaxrl_dist.running import evaluation, hosts, support, training

# A learned value beyond what rewards and discount allow by so much of it is said, and again when it has grown tenfold.
IMPLAUSIBLE, WORSE = 1.1, 10.0


class Watch:
    """The host's memory of what was seen and said; one for all runs of a session.

    names: how each run is called. configs: the configuration, whose floats may be arrays `[runs]`. agent_of, config_of:
    agent and configuration of a run by its number, the floats as numbers. say: shows a warning of one sentence.
    """

    def __init__(
        self,
        programs: training.Programs,
        names: Sequence[str],
        configs: Any,
        agent_of: Callable[[int], Agent],
        config_of: Callable[[int], Any],
        say: Callable[[str], None],
    ):
        self.programs, self.names, self.agent_of, self.config_of, self.say = programs, names, agent_of, config_of, say
        self.diverged: dict[int, tuple[int, str]] = {}  # run -> iteration and metric
        self.largest_bonus = np.zeros(len(names))
        # Of a plain run all configurations are the same.
        different = len(names) if any(np.size(x) > 1 for x in jax.tree.leaves(configs)) else 1
        claims = [agent_of(run).claim for run in range(different)] if programs.agent.claim else []
        discounts = np.array([float(claim.discount) for claim in claims])
        self.discounts = np.broadcast_to(discounts, len(names)) if claims else discounts
        self._said: set[str] = set()
        self._implausible_said = IMPLAUSIBLE

    # -- runs that break ----------------------------------------------------------------------------------------------

    def note_divergence(self, state: training.Training, say: bool) -> None:
        """Look for runs that broke since the last look."""
        broken_at = hosts.gather(state.broken_at)
        watched = training.watched_names(self.programs.metric_names)
        for run in np.flatnonzero((broken_at >= 0).any(1)):
            if run in self.diverged:
                continue
            column = min(np.flatnonzero(broken_at[run] >= 0), key=lambda column: broken_at[run, column])
            self.diverged[int(run)] = int(broken_at[run, column]), watched[column]
            if say:
                self.say(
                    f"{watched[column]} became NaN or infinite at iteration {broken_at[run, column]} in "
                    f"{self.names[run]}: frozen at its last finite learner, the others go on"
                )

    def note_broken_evaluations(
        self, state: training.Training, judged: Mapping[str, np.ndarray], iteration: int, say: bool
    ) -> training.Training:
        """The training with the runs marked as broken whose evaluation gave numbers that are not finite."""
        broken_at = np.array(hosts.gather(state.broken_at))
        watched = training.watched_names(self.programs.metric_names)
        for name in judged.keys() & set(watched):
            newly = ~np.isfinite(judged[name]) & (broken_at < 0).all(1)
            broken_at[newly, watched.index(name)] = iteration
        if (broken_at >= 0).any(1).sum() == len(self.diverged):
            return state
        state = self.programs.mark(state, broken_at)
        self.note_divergence(state, say)
        return state

    # -- numbers that cannot be right ---------------------------------------------------------------------------------

    def value_bounds(self, largest_reward: np.ndarray, averages: np.ndarray) -> list[float | None]:
        """The largest |value| of each run that rewards and discount allow: the largest reward so far, for ever; None
        where there is no such bound. The bonus of soft agents counts like a reward."""
        names = self.programs.metric_names
        if "largest_bonus" in names:
            bonus = np.nan_to_num(averages[:, names.index("largest_bonus")])
            self.largest_bonus = np.maximum(self.largest_bonus, bonus)
        if not len(self.discounts):
            return [None] * len(self.names)
        with np.errstate(divide="ignore", invalid="ignore"):
            bounds = (largest_reward + self.largest_bonus) / (1 - self.discounts)
        return [float(bound) if np.isfinite(bound) else None for bound in bounds]

    def look_at(self, rows: Sequence[Mapping[str, Any]], now: str) -> None:
        """Warn of what a log point shows, a row per run; `now`: where they stand."""
        self._warn_of_clipping(rows, now)
        self._warn_of_missing(rows)
        self._warn_of_implausible(rows, now)

    def _once(self, kind: str, sentence: str | None) -> None:
        if sentence and kind not in self._said:
            self._said.add(kind)
            self.say(sentence)

    def _warn_of_clipping(self, rows: Sequence[Mapping[str, Any]], now: str) -> None:
        clipped = [row.get("clipped_mass", 0.0) for row in rows]
        worst = int(np.argmax(np.nan_to_num(clipped)))
        config = self.config_of(worst)
        if support.has_support(config):
            self._once("clipping", support.clipping(clipped[worst], config, f"at {now} in {self.names[worst]}"))

    def _warn_of_missing(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Say once when Monte-Carlo returns leave much of their weight out."""
        missing = [row.get("calibration_missing", 0.0) for row in rows]
        worst = int(np.argmax(np.nan_to_num(missing)))
        if len(self.discounts):
            sentence = evaluation.what_is_missing(missing[worst], self.discounts[worst])
            self._once("missing", sentence and f"{self.names[worst]}: {sentence}")

    def _warn_of_implausible(self, rows: Sequence[Mapping[str, Any]], now: str) -> None:
        """Say once, and again when it is ten times worse, that learned values are beyond what is possible."""

        def excess(row: Mapping[str, Any]) -> float:
            claimed = max(abs(row.get(name, 0.0)) for name in ("value", "target"))  # NaN in a first row
            return claimed / row["value_bound"] if row["value_bound"] and claimed > 0 else 0.0

        worst = max(range(len(rows)), key=lambda run: excess(rows[run]))
        if excess(rows[worst]) <= self._implausible_said:
            return
        self._implausible_said = WORSE * excess(rows[worst])
        row = rows[worst]
        name = max(("value", "target"), key=lambda name: abs(row.get(name, 0.0)))
        self.say(
            f"{name} is {row[name]:.4g} at {now} in {self.names[worst]}, but no policy can be worth more than "
            f"{row['value_bound']:.4g}: the largest |reward| seen so far"
            f"{', and bonus,' if self.largest_bonus[worst] else ''} over 1 - discount; the critic over-estimates or "
            "diverges"
        )
