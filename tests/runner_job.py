"""A small network and its images; and, as a program, runs of the runner for the tests to watch.

`all OUT`, `durable OUT DIRECTORY`, or `process OUT DIRECTORY PORT NUMBER`: each saves the results
in OUT and prints how many images each device finished.
"""

import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from advjax import attacks, runner
from advjax.runner import checkpoint, lanes

CLASSES, PIXELS, MANY = 5, 24, 600


def parameters(seed):
    # By NumPy, as processes of a group are introduced to each other before JAX computes anything.
    rng = np.random.default_rng(seed)
    shapes = [(PIXELS, 16), (16, CLASSES)]
    return [rng.normal(size=shape).astype(np.float32) / 3 for shape in shapes]


def apply(params, x):
    first, second = params
    return jnp.tanh(x @ first) @ second


def draw(n):
    """Images, and for each a class that the network does not give it."""
    xs = np.random.default_rng(1).uniform(size=(n, PIXELS)).astype(np.float32)
    first, second = parameters(0)
    return xs, (np.argmax(np.tanh(xs @ first) @ second, axis=1) + 1 + np.arange(n) % 4) % CLASSES


LOGITS_FN = functools.partial(apply, parameters(0))
ATTACK = attacks.minimum_norm(LOGITS_FN)
XS, TARGETS = draw(60)


def attack_many(**options):
    """More images than a moment's work."""
    return runner.attack_images(ATTACK, *draw(MANY), batch_size=8, **options)


def count_images(pause):
    """The images that each device finishes, from now on; every turn is followed by a pause."""
    counts = np.zeros(jax.local_device_count(), int)
    turn = lanes._turn

    def counting(*args, **options):
        state, departures = turn(*args, **options)
        np.add(counts, np.asarray(departures.finished).reshape(len(counts), -1).sum(1), out=counts)
        time.sleep(pause)
        return state, departures

    lanes._turn = counting
    return counts


def main(kind, out, directory=None, port=None, number=None):
    if kind == "process":
        jax.distributed.initialize(f"localhost:{port}", 2, int(number))
    counts = count_images(pause=0.02 if kind == "durable" else 0)
    checkpoint._SECONDS = 0.0
    if kind == "durable":
        result = attack_many(directory=directory)
    else:
        result = runner.attack_images(ATTACK, XS, TARGETS, batch_size=4, directory=directory)
    np.savez(out, **result._asdict())
    print(json.dumps({"images": counts.tolist()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
