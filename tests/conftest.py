"""The strict configuration in which every test runs, and the networks that many attack."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import data, metrics, models, training

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true", help="run each test once, with one of its cases"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """For `--quick`: the cases take turns, so that all of those that tests share have theirs."""
    if config.getoption("quick"):
        tests = {}
        for item in items:
            tests.setdefault((item.path, item.originalname), []).append(item)
        chosen = [cases[i % len(cases)] for i, cases in enumerate(tests.values())]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@dataclasses.dataclass(frozen=True, eq=False)
class Victims:
    """A trained network, with the first test images that it gets right and a target for each."""

    model: object
    params: dict
    logits_fn: object
    images: jax.Array
    targets: jax.Array
    train_error: float
    test_error: float


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs():
    """Each keeps memory maps, of which Linux gives a process 65,530: XLA crashes beyond."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    """Keeps the user's cache out of the tests; networks that one test trains the next one reads."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp() / "cache"
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "advjax"


@pytest.fixture
def compilations():
    """A list that grows by one whenever XLA compiles a program; nothing is compiled yet."""
    jax.clear_caches()
    events = []

    def note(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield events
    # Older releases keep a listener for good, which does no harm.
    getattr(jax.monitoring, "unregister_event_duration_listener", lambda _: None)(note)


@pytest.fixture(scope="session")
def mnist():
    """Train and test digits: the whole of MNIST where it is prepared, else the sample."""
    source = "tfds" if "TFDS_DATA_DIR" in os.environ else "embedded"
    return tuple(data.load("mnist", split, source=source) for split in ("train", "test"))


def _train(model, lambdas, epochs, mnist, count=50):
    train, test = mnist
    params = training.fit(
        jax.random.key(3),
        model.apply,
        model.init(jax.random.key(2), train.images[0]),
        train.images,
        train.labels,
        penalty=training.weight_decay(lambdas),
        epochs=epochs,
    ).params
    logits_fn = functools.partial(model.apply, params)
    right = np.asarray(jax.vmap(logits_fn)(test.images[:200]).argmax(1)) == test.labels[:200]
    chosen = np.flatnonzero(right)[:count]
    return Victims(
        model=model,
        params=params,
        logits_fn=logits_fn,
        images=jnp.asarray(test.images[chosen]),
        targets=jnp.asarray((test.labels[chosen] + 1 + np.arange(count) % 9) % 10),
        train_error=metrics.error_rate(logits_fn, train.images, train.labels),
        test_error=metrics.error_rate(logits_fn, test.images, test.labels),
    )


@pytest.fixture(scope="session")
def fc10(mnist):
    """The paper's FC10(1e-4): linear, so that its minimum distortion is a quadratic program."""
    return _train(models.Softmax(), 1e-4, 20, mnist)


@pytest.fixture(scope="session")
def fc100(mnist):
    """The paper's FC100-100-10."""
    return _train(models.MLP(), (1e-4, 1e-4, 1e-5), 60, mnist)
