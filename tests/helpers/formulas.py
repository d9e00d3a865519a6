"""The independent implementation of every loss, which tests compare with softcache's."""

from collections.abc import Callable

from tests.helpers import formulas_of_layers as layers
from tests.helpers import formulas_of_logits as logits
from tests.helpers.tensors import Case

FORMULAS: dict[str, Callable[[Case], float]] = {
    "hard": logits.hard,
    "tf_kd": logits.tf_kd,
    "output": logits.output,
    "kd": logits.kd,
    "logit_mse": logits.logit_mse,
    "dkd": logits.dkd,
    "nkd": logits.nkd,
    "dist": logits.dist,
    "wsld": logits.wsld,
    "ctkd": logits.ctkd,
    "multi_temperature": logits.multi_temperature,
    "logit_adjusted": logits.logit_adjusted,
    "balanced_softmax": logits.balanced_softmax,
    "balanced_kd": logits.balanced_kd,
    "dive": logits.dive,
    "soft_f1": logits.soft_f1,
    "hint": layers.hint,
    "concat_hint": layers.concat_hint,
    "vid": layers.vid,
    "attention": layers.sum_over_pairs(layers.attention),
    "nst": layers.sum_over_pairs(layers.nst),
    "similarity": layers.sum_over_pairs(layers.similarity),
    "rkd": layers.sum_over_pairs(layers.rkd),
    "pkt": layers.sum_over_pairs(layers.pkt),
    "cc": layers.sum_over_pairs(layers.cc),
    "srrl": layers.srrl,
    "cat_kd": layers.cat_kd,
    "simkd": layers.simkd,
    "crd": layers.crd,
    "review_kd": layers.review_kd,
}
