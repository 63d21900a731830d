"""The numbers of the paper's Tables 1 to 5, and of two later papers, as plain data.

Errors and rates are in percent, distortions are RMS per pixel with pixels in [0, 1]. The keys
name the networks as the paper does; a prime marks the same network trained on the other half.

Source: Szegedy et al. (2013), arXiv:1312.6199v4.
"""

from typing import NamedTuple


class Table1(NamedTuple):
    """A network of Table 1: errors in percent, and the average minimum distortion (RMS)."""

    train_error: float
    test_error: float
    distortion: float


TABLE1: dict[str, Table1] = {
    "FC10(1e-4)": Table1(6.7, 7.4, 0.062),
    "FC10(1e-2)": Table1(10.0, 9.4, 0.1),
    "FC10(1)": Table1(21.2, 20.0, 0.14),
    "FC100-100-10": Table1(0.0, 1.64, 0.058),
    "FC200-200-10": Table1(0.0, 1.54, 0.065),
    "AE400-10": Table1(0.57, 1.9, 0.086),
}


class Transfer(NamedTuple):
    """A row of Table 2 or 4: for each column's network the error (percent) on one set of images."""

    errors: dict[str, float]
    distortion: float
    """The average distortion of those images (RMS)."""


def _transfer(columns: tuple[str, ...], *errors: float, distortion: float) -> Transfer:
    return Transfer(dict(zip(columns, errors, strict=True)), distortion)


_TABLE2 = tuple(TABLE1)

TABLE2: dict[str, Transfer] = {
    "FC10(1e-4)": _transfer(_TABLE2, 100, 11.7, 22.7, 2, 3.9, 2.7, distortion=0.062),
    "FC10(1e-2)": _transfer(_TABLE2, 87.1, 100, 35.2, 35.9, 27.3, 9.8, distortion=0.1),
    "FC10(1)": _transfer(_TABLE2, 71.9, 76.2, 100, 48.1, 47, 34.4, distortion=0.14),
    "FC100-100-10": _transfer(_TABLE2, 28.9, 13.7, 21.1, 100, 6.6, 2, distortion=0.058),
    "FC200-200-10": _transfer(_TABLE2, 38.2, 14, 23.8, 20.3, 100, 2.7, distortion=0.065),
    "AE400-10": _transfer(_TABLE2, 23.4, 16, 24.8, 9.4, 6.6, 100, distortion=0.086),
    "Gaussian 0.1": _transfer(_TABLE2, 5.0, 10.1, 18.3, 0, 0, 0.8, distortion=0.1),
    "Gaussian 0.3": _transfer(_TABLE2, 15.6, 11.3, 22.7, 5, 4.3, 3.1, distortion=0.3),
}
"""Transfer between networks: a row names the network that training images were distorted for."""


class Table3(NamedTuple):
    """A network of Table 3, trained on one half (P1 or P2) of the training set."""

    error_p1: float
    error_p2: float
    test_error: float
    distortion: float


TABLE3: dict[str, Table3] = {
    "FC100-100-10": Table3(0.0, 2.4, 2.0, 0.062),
    "FC123-456-10": Table3(0.0, 2.5, 2.1, 0.059),
    "FC100-100-10'": Table3(2.3, 0.0, 2.1, 0.058),
}
"""The networks of Table 4; the first two are trained on P1, the last one on P2."""

_TABLE4 = tuple(TABLE3)

TABLE4: dict[str, Transfer] = {
    "FC100-100-10": _transfer(_TABLE4, 100, 26.2, 5.9, distortion=0.062),
    "FC123-456-10": _transfer(_TABLE4, 6.25, 100, 5.1, distortion=0.059),
    "FC100-100-10'": _transfer(_TABLE4, 8.2, 8.2, 100, distortion=0.058),
    "Gaussian 0.06": _transfer(_TABLE4, 2.2, 2.6, 2.4, distortion=0.06),
}
"""Transfer between training sets: the rows name the network the test images were distorted for."""

TABLE4_MAGNIFIED: dict[str, Transfer] = {
    "FC100-100-10": _transfer(_TABLE4, 100, 98, 43, distortion=0.1),
    "FC123-456-10": _transfer(_TABLE4, 96, 100, 22, distortion=0.1),
    "FC100-100-10'": _transfer(_TABLE4, 27, 50, 100, distortion=0.1),
    "Gaussian 0.1": _transfer(_TABLE4, 2.6, 2.8, 2.7, distortion=0.1),
}
"""The lower half of Table 4: the same distortions scaled to an RMS of 0.1."""


class Table5(NamedTuple):
    """A layer of AlexNet in Table 5 and the printed bound of its Lipschitz constant."""

    shape: tuple[int, ...]
    """The kernel's: (in, height, width, out) of a convolution, (in, out) of a dense layer."""
    stride: int | None
    bound: float


TABLE5: dict[str, Table5] = {
    "Conv. 1": Table5((3, 11, 11, 96), 4, 2.75),
    "Conv. 2": Table5((96, 5, 5, 256), 1, 10.0),
    "Conv. 3": Table5((256, 3, 3, 384), 1, 7.0),
    "Conv. 4": Table5((384, 3, 3, 384), 1, 7.5),
    "Conv. 5": Table5((384, 3, 3, 256), 1, 11.0),
    "FC. 1": Table5((9216, 4096), None, 3.12),
    "FC. 2": Table5((4096, 4096), None, 4.0),
    "FC. 3": Table5((4096, 1000), None, 4.0),
}

ADVERSARIAL_TRAINING: dict[str, str] = {
    "weight decay": "1.6",
    "dropout": "about 1.3",
    "pools of all layers": "below 1.2",
}
"""Test errors of 100-100-10 in percent, from the text of section 4.2."""

FIGURE5_DISTORTION = 0.006508
"""The mean over the photographs of Figure 5, made for AlexNet."""

FIGURE7_GAUSSIAN_ACCURACY = 51.0
"""Percent right under Gaussian noise of standard deviation 1, for an unnamed network."""


class FastGradient(NamedTuple):
    """Results of the fast gradient sign method on a network, in percent."""

    epsilon: float
    error: float
    confidence: float
    """The mean probability of the wrong class."""


FAST_GRADIENT: dict[str, FastGradient] = {
    "shallow softmax": FastGradient(0.25, 99.9, 79.3),
    "maxout": FastGradient(0.25, 89.4, 97.6),
}
"""On MNIST's test set; Goodfellow, Shlens and Szegedy (2014), arXiv:1412.6572, section 4."""


class Robustness(NamedTuple):
    """A network's mean `|r| / |x|` by two attacks."""

    lbfgs: float
    fast_gradient: float


ROBUSTNESS: dict[str, Robustness] = {
    "LeNet": Robustness(0.25, 1.0),
    "FC500-150-10": Robustness(0.12, 0.39),
}
"""On MNIST; Moosavi-Dezfooli, Fawzi and Frossard (2016), arXiv:1511.04599, Table 1."""
