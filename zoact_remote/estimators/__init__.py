"""Gradient estimators: which probes to ask for, and what their losses say."""

from zoact_remote.estimators.base import Ask, Draw, Estimate, Estimator
from zoact_remote.estimators.forward_difference import ForwardDifference
from zoact_remote.estimators.fzoo import FZOO
from zoact_remote.estimators.leave_one_out import LeaveOneOut
from zoact_remote.estimators.two_point import TwoPoint

__all__ = ["FZOO", "Ask", "Draw", "Estimate", "Estimator", "ForwardDifference", "LeaveOneOut", "TwoPoint"]
