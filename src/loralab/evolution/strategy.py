"""Evolution strategies as ask / tell on immutable state.

    state = begin(options, space, seed)
    population = ask(state)                      # regenerable from (seed, generation)
    state = tell(state, population, fitness)     # pure, deterministic

The update is the score-function estimate of Salimans et al. 2017 (arXiv 1703.03864) in units of
the noise: step = lr * sigma * (1 / P) * sum_i shaped_i * sign_i * noise_i, so that a learning
rate means the same for tensors of any magnitude. An fp32 master is moved; members are casts of
master plus noise and never written back, so nothing drifts (loralab's design, fact 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from loralab.config import EvolutionConfig
from loralab.evolution.layout import Floats
from loralab.evolution.noise import pair_weights
from loralab.evolution.optimizers import Moments, step
from loralab.evolution.schedules import multiplier, start_factor
from loralab.evolution.shaping import Fitness, shape
from loralab.evolution.space import Perturbed, Space


@dataclass(frozen=True)
class SearchState:
    """Where a search stands. `master` (n,) is never written to.

    floor: what stands in for fitness that is not finite; None takes the lowest finite one.
    """

    options: EvolutionConfig
    space: Space
    seed: int
    generation: int
    master: Floats
    moments: Moments = field(default_factory=Moments)
    floor: float | None = None

    @property
    def sigma_scale(self) -> float:
        """What multiplies every sigma in this generation: schedule and init / perturb scale."""
        options = self.options
        schedule = multiplier(options.sigma_schedule, self.generation, options.generations)
        return schedule * start_factor(options.scale, self.generation)

    @property
    def lr(self) -> float:
        """The learning rate of this generation, in units of sigma."""
        options = self.options
        schedule = multiplier(options.lr_schedule, self.generation, options.generations)
        return options.optimizer.lr * schedule


@dataclass(frozen=True)
class Population:
    """The members of one generation; member 2i is + and 2i + 1 is - noise i if antithetic."""

    generation: int
    perturbed: Perturbed


def begin(
    options: EvolutionConfig, space: Space, seed: int, floor: float | None = None
) -> SearchState:
    """The state before generation 0."""
    return SearchState(options, space, seed, 0, space.start(), floor=floor)


def ask(state: SearchState, threads: int = 1) -> Population:
    """The members of the state's generation. The result does not depend on `threads`."""
    options = state.options
    perturbed = state.space.perturb(
        state.master,
        state.seed,
        state.generation,
        options.population,
        options.antithetic,
        state.sigma_scale,
        threads,
    )
    return Population(state.generation, perturbed)


def tell(state: SearchState, population: Population | None, fitness: Fitness) -> SearchState:
    """The next state, given rewards (P,) or (P, prompts) in the order of the members.

    population: what `ask` gave, whose noise is used if it was kept; None draws the noise again,
        with the same result to the last bit.

    A generation that tells nothing (all rewards tied) changes nothing but the generation's number:
    neither momentum nor weight decay moves the master.

    Raises:
        ValueError: fitness is not one row a member, or the population is another generation's.
    """
    return moved(state, population, weights_of(fitness, state.options, state.floor))


def weights_of(fitness: Fitness, options: EvolutionConfig, floor: float | None) -> list[float]:
    """What a generation's rewards, as `tell` takes them, come to: the weight of each draw of noise
    in the step, all that a state's move depends on. floor: as `shape` has it.

    Raises:
        ValueError: fitness is not one row a member.
    """
    rewards = np.asarray(fitness, dtype=np.float64)
    if rewards.shape[:1] != (options.population,):
        raise ValueError(
            f"fitness has shape {rewards.shape}; expected {options.population} members first"
        )
    shaped = shape(rewards, options.shaping, floor, options.per_prompt_baseline)
    return [w / options.population for w in pair_weights(shaped, options.antithetic)]


def moved(
    state: SearchState, population: Population | None, weights: Sequence[float]
) -> SearchState:
    """The next state, given what `weights_of` made of the rewards.

    Raises:
        ValueError: the population is another generation's.
    """
    options = state.options
    if population is not None and population.generation != state.generation:
        raise ValueError(
            f"population of generation {population.generation} told to a state of generation "
            f"{state.generation}"
        )
    onward = partial(replace, state, generation=state.generation + 1)
    if not any(weights):
        return onward()
    noise = None if population is None else population.perturbed.noise
    direction = state.space.ascent(state.seed, state.generation, weights, noise)
    movement, moments = step(options.optimizer, state.moments, direction)
    # What no moment holds on to is ours to overwrite: a dense change of all weights is large.
    spare = None if movement is moments.first else movement
    return onward(master=_moved(state, movement, spare), moments=moments)


def _moved(state: SearchState, movement: Floats, out: Floats | None) -> Floats:
    """The master after a step (n,) in units of sigma, and decay toward the start."""
    space, decay = state.space, state.options.weight_decay * state.lr
    factors = {name: state.lr * state.sigma_scale * s for name, s in space.sigmas.items()}
    master = space.layout.scaled(movement, factors, out)
    master += state.master
    if decay:
        pull = state.master - space.start()
        pull *= np.float32(decay)
        master -= pull
    return master
