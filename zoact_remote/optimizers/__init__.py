"""Optimisers whose whole state is a few kilobytes of seeds and scalars, whatever the model's size."""

from zoact_remote.optimizers.adam import Adam, AdamW
from zoact_remote.optimizers.adam_gaussian import GaussianAdam
from zoact_remote.optimizers.base import Optimizer
from zoact_remote.optimizers.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "GaussianAdam", "Optimizer"]
