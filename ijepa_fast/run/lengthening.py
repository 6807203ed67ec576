"""Runs that go on for longer than they were begun for: their schedules are stretched, and that is told."""

from __future__ import annotations

import logging
from pathlib import Path

from ijepa_fast.config import TrainConfig
from ijepa_fast.optim.schedules import Schedules
from ijepa_fast.run.checkpoint import Checkpoint, CheckpointDamaged, CheckpointError
from ijepa_fast.run.folder import LENGTH

log = logging.getLogger(__name__)


def length_before(state: Checkpoint, steps_per_epoch: int) -> int:
    """Steps of the run by the settings that a checkpoint was written with.

    Raises:
        CheckpointDamaged: it holds none.
    """
    settings = {name.partition(".")[2]: state.extra["settings"].get(name) for name in LENGTH}
    try:
        return TrainConfig(**settings).total_steps(steps_per_epoch)
    except (TypeError, ValueError) as error:
        raise CheckpointDamaged(f"the checkpoint after step {state.step} has no length of its run: {error}") from error


def refuse_shortening(folder: Path, state: Checkpoint, steps_per_epoch: int, total_steps: int) -> None:
    """Raise CheckpointError if the run in ``folder`` is to have fewer steps than it was begun for."""
    before = length_before(state, steps_per_epoch)
    if total_steps < before and "imported" not in state.extra:
        raise CheckpointError(
            f"{folder} holds a run of {before} steps, {state.step} of them done, and is not shortened to "
            f"{total_steps}: stop it where you like, and its newest checkpoint is what there is"
        )


def tell_of_stretching(step: int, then: Schedules, now: Schedules, before: int, total_steps: int) -> None:
    """Tell what a longer run changes at ``step``: the schedules ``then``, over ``before`` steps, and ``now``."""
    log.warning(
        "the run is lengthened from %d to %d steps and its schedules are stretched: the learning rate is %.3g now (it "
        "was %.3g), weight decay %.3g (%.3g) and momentum %.5g (%.5g). It does not end as if it had had this length "
        "from its first step",
        *(before, total_steps, now.lr_at(step), then.lr_at(step - 1)),
        *(now.weight_decay_at(step), then.weight_decay_at(step - 1), now.momentum_at(step), then.momentum_at(step - 1)),
    )
