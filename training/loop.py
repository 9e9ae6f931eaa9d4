"""The training loop by the clock: a run ends when it must, whatever the machine manages in that time."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

__all__ = ["descend", "run_for"]

FIRST_SAVE, SAVE_EVERY = 90.0, 120.0  # seconds
FIRST_NOTE, NOTE_EVERY = 10.0, 20.0


def descend(loss: Tensor, modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
    """One update of all parameters along the loss's gradient, whose norm is cut at 1."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for module in modules for p in module.parameters()], 1.0)
    for optimizer in optimizers:
        optimizer.step()


def run_for(minutes: float, name: str, step: Callable[[float], Tensor], save: Callable[[], str]) -> int:
    """Call `step` with the progress, 0..1, until the time is up.

    Args:
        minutes: how long.
        name: start of the lines printed.
        step: one update; returns the loss.
        save: called now and then, and at the end; returns what is to be printed, if anything.

    Returns:
        The number of steps.
    """
    start = time.monotonic()
    duration, next_save, next_note, steps = minutes * 60, FIRST_SAVE, FIRST_NOTE, 0
    bar = tqdm(total=round(duration), unit="s", desc=name, mininterval=30)
    while (elapsed := time.monotonic() - start) < duration:
        loss = step(elapsed / duration)
        steps += 1
        if elapsed > next_note:
            next_note += NOTE_EVERY
            bar.update(round(elapsed) - bar.n)
            print(f"{name} {elapsed:6.0f} s, step {steps}, loss {loss.item():.3f}", flush=True)
        if elapsed > next_save:
            next_save += SAVE_EVERY
            said = save()
            if said:
                print(f"{name} {elapsed:6.0f} s, step {steps}, {said}", flush=True)
    bar.close()
    save()
    print(f"{name} {steps} steps", flush=True)
    return steps
