"""The attacks that the tests of all attacks take: one line for a new one."""

import functools

import pytest

from advjax import attacks

SEARCHES = (attacks.lbfgs, attacks.minimum_norm)
"""Those that find the nearest image of a target class, with the options that all of them have."""
each_attack = pytest.mark.parametrize("attack", SEARCHES, ids=lambda attack: attack.__name__)

MAKERS = {
    **{attack.__name__: attack for attack in SEARCHES},
    "fgsm": functools.partial(attacks.fgsm, epsilon=0.1, targeted=True),
    "untargeted": lambda logits_fn: attacks.untargeted(attacks.minimum_norm(logits_fn), k=2),
    "quantized": lambda logits_fn: attacks.quantized(attacks.minimum_norm(logits_fn), levels=16),
}
"""Every attack, as a function of the model alone."""
