"""The options that several experiments share, declared and documented once."""

import dataclasses
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

from advjax import data
from advjax.data.loading import Name, Source

PHOTOGRAPHS = "photographs"
"""The data set of the experiments that are not on digits."""


def trial(**options: Any) -> Mapping[str, Any]:
    """Declare the options that a trial replaces."""
    return MappingProxyType(options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of every experiment; subclasses add fields, each with a docstring."""

    out: Path = Path("results")
    """The folder for the numbers and the figures."""
    quick: bool = False
    """Run a trial of about a minute, with few images and briefly trained networks."""
    reuse: bool = False
    """Reuse the numbers in `out` if they were measured with the same options."""

    TRIAL: ClassVar[Mapping[str, Any]] = trial()
    TRIAL_STEPS: ClassVar[int] = 300
    """The number of steps for which a network is trained in a trial."""

    @property
    def steps(self) -> int | None:
        """The number of training steps; that of a network's recipe if None."""
        return self.TRIAL_STEPS if self.quick else None

    @property
    def expected_source(self) -> str:
        """The source of the data if it is available."""
        raise NotImplementedError

    def load(self) -> Any:
        """Load what is measured on; its `splits` are the data sets, if there are any."""
        raise NotImplementedError

    def resolved(self) -> Self:
        """Return these options, with those of a trial filled in if it is one."""
        return dataclasses.replace(self, **self.TRIAL) if self.quick else self

    def config(self) -> dict[str, Any]:
        """The options that affect the numbers, as JSON holds them; the shared ones come last."""
        given = {name: _plain(value) for name, value in vars(self).items()}
        shared = {"dataset": PHOTOGRAPHS, "quick": False, "seeds": 1}
        elsewhere = {*shared, "out", "reuse", "source", "folder"}
        own = {name: value for name, value in given.items() if name not in elsewhere}
        return {name: value for name, value in own.items() if _is_set(value)} | {
            name: given.get(name, value) for name, value in shared.items()
        }

    def command(self, name: str, source: str) -> str:
        """The command that measures an experiment with these options on data from this source."""
        given = {**self.config(), "source": source, "folder": _plain(getattr(self, "folder", None))}
        flags = [
            f" --{option.replace('_', '-')}" + ("" if value is True else f" {_words(value)}")
            for option, value in given.items()
            if hasattr(self, option) and _is_set(value)
        ]
        return f"python -m experiments {name}{''.join(flags)}"


class Digits(NamedTuple):
    """MNIST, or another data set of its form."""

    train: data.Dataset
    test: data.Dataset

    @property
    def splits(self) -> tuple[data.Dataset, ...]:
        """The data sets that are measured on."""
        return tuple(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The choice of digits."""

    dataset: Name = "mnist"
    """The data set."""
    source: Source = "auto"
    """Its source: tensorflow-datasets, the sample of MNIST inside the package, or the first of the
    two that is available. A trial uses the sample."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitOptions(Options, DataOptions):
    """The options of an experiment on MNIST or on a data set of its form."""

    seeds: int = 1
    """How many times to measure, each time with retrained networks and other images."""

    @property
    def expected_source(self) -> str:
        """The preferred source; whether it is available is known after loading."""
        if self.quick and self.dataset == "mnist":
            return "embedded"
        return "tfds" if self.source == "auto" else self.source

    def load(self) -> Digits:
        """Load the training and the test images from one source, and print which.

        A trial uses the sample of MNIST inside the package, or as many images of another set.
        """
        source = "embedded" if self.expected_source == "embedded" else self.source
        with warnings.catch_warnings(record=True) as caught:
            train = data.load(self.dataset, "train", source=source)
        for warning in caught:
            print(f"Note: {warning.message}", file=sys.stderr)
        found: Source = "tfds" if train.source == "tfds" else "embedded"
        digits = Digits(train, data.load(self.dataset, "test", source=found))
        if self.quick:
            digits = Digits(*map(first, digits, (5000, 1000)))
        where = {"tfds": "tensorflow-datasets", "embedded": "the sample inside the package"}
        print(
            f"{self.dataset}, {where[found]}: {len(digits.train.labels):,} training and "
            f"{len(digits.test.labels):,} test images.",
            flush=True,
        )
        return digits


@dataclasses.dataclass(frozen=True, kw_only=True)
class VictimOptions(DigitOptions):
    """The options of an experiment that attacks images of several networks."""

    images: int = 1000
    """How many images to attack for each seed."""
    seeds: int = 5
    TRIAL = trial(images=64, seeds=2)


def first(split: data.Dataset, count: int) -> data.Dataset:
    """Keep the first images of a data set."""
    return split._replace(images=split.images[:count], labels=split.labels[:count])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhotographOptions(Options):
    """The options of an experiment on photographs."""

    folder: Path | None = None
    """A folder of photographs, named after or sorted by their ImageNet classes; foolbox's twenty if
    None."""

    @property
    def expected_source(self) -> str:
        """The source of the photographs."""
        return "foolbox" if self.folder is None else str(self.folder.expanduser())


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if _many(value) else value


def _many(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if _many(value) else str(value)
