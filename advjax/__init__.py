"""Minimum-distortion adversarial examples in JAX, as pure functions.

An implementation of "Intriguing properties of neural networks" (Szegedy et al., 2013,
arXiv:1312.6199).
"""
