"""The losses as objects: `losses.KD(temperature=4, weight=0.9)` is `"kd:temperature=4,weight=0.9"`.

Every parameter of a loss that is a number may be a `Ramp`. A function or a module of your own is a loss as it is, or
with a weight: `losses.Custom(my_loss, weight=0.5)`.
"""

from softcache.pipeline.losses import LOSSES, Loss, parse_losses
from softcache.pipeline.losses.base import Ramp
from softcache.pipeline.losses.classifier import SRRL, CatKD, SimKD
from softcache.pipeline.losses.crd import CRD
from softcache.pipeline.losses.custom import Custom
from softcache.pipeline.losses.decoupled import DIST, DKD, NKD, MultiTemperature
from softcache.pipeline.losses.embedding import Embed
from softcache.pipeline.losses.hard import Hard, TfKD
from softcache.pipeline.losses.hint import VID, ConcatHint, Hint
from softcache.pipeline.losses.kd import CTKD, KD, WSLD, LogitMSE, Output
from softcache.pipeline.losses.long_tail import BalancedKD, BalancedSoftmax, DiVE, LogitAdjusted, SoftF1
from softcache.pipeline.losses.regression import KDMSE, MSE, Bounded, Huber
from softcache.pipeline.losses.relational import CC, NST, PKT, RKD, Attention, Similarity
from softcache.pipeline.losses.review_kd import ReviewKD
from softcache.pipeline.losses.several_labels import BCE, MLKD, Asymmetric, KDSigmoid

__all__ = [
    "BCE",
    "CC",
    "CRD",
    "CTKD",
    "DIST",
    "DKD",
    "KD",
    "KDMSE",
    "LOSSES",
    "MLKD",
    "MSE",
    "NKD",
    "NST",
    "PKT",
    "RKD",
    "SRRL",
    "VID",
    "WSLD",
    "Asymmetric",
    "Attention",
    "BalancedKD",
    "BalancedSoftmax",
    "Bounded",
    "CatKD",
    "ConcatHint",
    "Custom",
    "DiVE",
    "Embed",
    "Hard",
    "Hint",
    "Huber",
    "KDSigmoid",
    "LogitAdjusted",
    "LogitMSE",
    "Loss",
    "MultiTemperature",
    "Output",
    "Ramp",
    "ReviewKD",
    "SimKD",
    "Similarity",
    "SoftF1",
    "TfKD",
    "parse_losses",
]
