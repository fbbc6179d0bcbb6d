"""User-level differential privacy: what a client's whole data set can change of the result is hidden by noise.

DP-FedAvg (arXiv 1710.06963): w <- w + step((sum_k clip(delta_k) + N(0, (z C)^2)) / (q N)), every client k taking part
with probability q. Clipping is of all tensors of an update together, by the client, and again by the server: a bound
that nobody enforces is none. What a server optimiser does with the mean is post-processing.

The clip norm may follow a quantile of clients' norms (arXiv 1905.03871): each says by one more element of its update
whether it was within, 1/2 or -1/2, and that element's mean has noise too. All leaves the clients as one linear sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flocktune.config.privacy import AdaptiveClipping, UserPrivacy
from flocktune.errors import FlocktuneError, Problem, UpdateRefused, UserError
from flocktune.interfaces import Memory, ServerHalf, State, Transform
from flocktune.privacy.accounting import Budget, calibrate
from flocktune.privacy.gaussian import GaussianMechanism, sums_of
from flocktune.privacy.noise import derive_key
from flocktune.tensors import digest, group, prefixed, without
from flocktune.types import ClientTask, Tensors, Update

NAME = "privacy"
CLIP_NORM, WITHIN = f"{NAME}/clip_norm", f"{NAME}/within"
"""In messages and state, the norm in force (0-d); in an update, whether it was within (0-d, 1/2 or -1/2)."""


@dataclass(frozen=True)
class ClientPrivacy:
    """A recipe's settings for ``clients`` clients, each in a round with probability ``sampling``, over ``rounds``.

    Formal guarantees: each round's state, and with it the result, is (epsilon, delta)-differentially private for
    neighbours that differ by one client, as :attr:`budget` says, against whoever sees states and results, all clients
    together among them. The server is trusted: it sees updates (with secure aggregation their sum), draws cohorts and
    noise and keeps them secret. Its log (who took part, losses, norms) is not covered.
    """

    settings: UserPrivacy
    clients: int
    sampling: float
    rounds: int

    @cached_property
    def budget(self) -> Budget:
        """Of all rounds; the noise is calibrated here, when the recipe says an epsilon."""
        own = self.settings
        noise = own.noise_multiplier
        if noise is None:
            noise = calibrate(own.accountant, self.sampling, self.rounds, own.delta, own.epsilon or 0.0)
        return Budget(self.sampling, noise, own.delta, own.accountant, own.max_epsilon or math.inf)

    def affordable_or_refused(self) -> int:
        """How many of the rounds may be run: the run ends before the one that would spend too much.

        Raises UserError when it is none.
        """
        rounds = self.budget.affordable(self.rounds)
        if not rounds:
            got = f"{self.budget.epsilon(1):.3g} spent by the first"
            fix = "Raise it, or privacy.noise_multiplier."
            raise UserError(Problem("privacy.max_epsilon", "at least what one round costs", got, fix))
        return rounds

    @property
    def for_updates(self) -> GaussianMechanism:
        """Clipping and noise of the updates, with the first clip norm."""
        share = self.settings.adaptive.share if self.settings.adaptive else 0.0
        noise = self.budget.noise_multiplier / math.sqrt(1 - share)
        return GaussianMechanism(self.settings.clip_norm, noise, self.sampling * self.clients, self.sampling)

    @property
    def for_within(self) -> GaussianMechanism | None:
        """Clipping and noise of the elements that say who was within the norm; each is 1/2 or -1/2.

        With z_u of the updates, 1 / z_u^2 + 1 / z_w^2 = 1 / z^2: together they cost what the budget says.
        """
        adaptive = self.settings.adaptive
        if adaptive is None:
            return None
        noise = self.budget.noise_multiplier / math.sqrt(adaptive.share)
        return GaussianMechanism(0.5, noise, self.sampling * self.clients, self.sampling)

    def told(self, rounds: int) -> dict[str, Any]:
        """What ``rounds`` rounds have spent, for a log."""
        return self.budget.told(rounds, "client", "round")


def clipping(settings: UserPrivacy) -> Transform:
    """A client clips its update to the norm that came with the task; the server refuses to take its word for it."""
    start = GaussianMechanism(settings.clip_norm, 0.0, 1.0, 1.0)
    adaptive = settings.adaptive is not None

    def on_client(update: Update, task: ClientTask, memory: Memory) -> tuple[Update, Memory]:
        delta, within = start.with_clip_norm(_clip_norm(task.tensors)).clipped(update.delta)
        said = {WITHIN: torch.tensor(0.5 if within else -0.5)} if adaptive else {}
        return replace(update, delta={**delta, **said}), memory

    def on_server(update: Update, expected: Tensors) -> Update:
        if not math.isclose(update.weight, update.clients, rel_tol=1e-6):
            raise UpdateRefused(f"update refused: weight: expected 1 of each client, got {update.weight}")
        enforced = start.with_clip_norm(float(expected[WITHIN])) if adaptive else start
        delta, _ = enforced.clipped({name: value for name, value in update.delta.items() if name != WITHIN})
        said = {WITHIN: update.delta[WITHIN].clamp(-0.5, 0.5)} if adaptive else {}
        return replace(update, delta={**delta, **said})

    return Transform(NAME, on_client, on_server)


def noised(half: ServerHalf, privacy: ClientPrivacy, secret: bytes | None) -> ServerHalf:
    """``half`` with clip norms in its messages, and noise in the mean that it steps by.

    State: ``privacy/clip_norm`` and ``privacy/rounds``, how many were spent, beside that of ``half``. ``secret``: the
    run's key; without one no step can be taken. Noise is a function of the secret, the round and the sum itself, so
    that a round which is repeated to the same sum is the same, and to another sum has other noise.
    """
    if half.combine is not None:
        raise ValueError("noise is for a sum of clipped updates, and this method combines them in another way")
    adaptive, for_within = privacy.settings.adaptive, privacy.for_within
    rounds_name = f"{NAME}/rounds"

    def init(tensors: Tensors) -> State:
        own = {CLIP_NORM: torch.tensor(privacy.settings.clip_norm), rounds_name: torch.tensor(0)}
        return {**half.init(tensors), **own}

    def message(state: State, round: int) -> Tensors:
        return {**half.message(without(state, NAME), round), CLIP_NORM: state[CLIP_NORM]}

    def returned(received: Tensors) -> Tensors:
        # Its value is what the server's side of the clipping enforces.
        within = {WITHIN: received[CLIP_NORM]} if adaptive else {}
        return {**half.returned(without(received, NAME)), **within}

    def prepare(state: State, round: int) -> tuple[State, Mapping[str, Any]]:
        prepared, told = half.prepare(without(state, NAME), round)
        return {**prepared, **prefixed(NAME, group(state, NAME))}, told

    def step(state: State, update: Update) -> State:
        if secret is None:
            raise FlocktuneError("differential privacy needs the run's secret key, and there is none here")
        done = int(state[rounds_name])
        sums = sums_of(update.delta, update.clients)
        key = derive_key(secret, "round", done, digest(sums))
        clip_norm = state[CLIP_NORM]
        if adaptive and for_within:
            share = float(for_within.noised({WITHIN: sums.pop(WITHIN)}, key)[WITHIN].clamp(-0.5, 0.5)) + 0.5
            clip_norm = _next_norm(clip_norm, share, adaptive)
        mechanism = privacy.for_updates.with_clip_norm(float(state[CLIP_NORM]))
        stepped = half.step(without(state, NAME), replace(update, delta=mechanism.noised(sums, key)))
        return {**stepped, CLIP_NORM: clip_norm, rounds_name: torch.tensor(done + 1)}

    return replace(
        half,
        init=init,
        message=message,
        returned=returned,
        addressed=_Addressed(half),
        prepare=prepare,
        step=step,
        result=lambda state: half.result(without(state, NAME)),
    )


class _Addressed:
    """``half.addressed`` with the clip norm; whom it gives the same object, they are given the same here."""

    def __init__(self, half: ServerHalf) -> None:
        self.half = half
        self.message: Tensors | None = None
        self.bare: Tensors = {}
        self.made: dict[int, tuple[Tensors, Tensors]] = {}

    def __call__(self, message: Tensors, client: str) -> Tensors:
        if message is not self.message:
            self.message, self.bare, self.made = message, without(message, NAME), {}
        part = self.half.addressed(self.bare, client)
        return self.made.setdefault(id(part), (part, {**part, CLIP_NORM: message[CLIP_NORM]}))[1]


def _next_norm(now: Tensor, within: float, adaptive: AdaptiveClipping) -> Tensor:
    """Andrew et al., arXiv 1905.03871, section 2: a geometric step towards the quantile."""
    return (now.double() * math.exp(-adaptive.lr * (within - adaptive.quantile))).float()


def _clip_norm(tensors: Tensors) -> float:
    """Of a task. Raises FlocktuneError when there is none, or no norm."""
    value = float(tensors[CLIP_NORM]) if CLIP_NORM in tensors else math.nan
    if not (math.isfinite(value) and value > 0):
        raise FlocktuneError(f"{CLIP_NORM}: expected a positive number in the task, got {value}")
    return value
