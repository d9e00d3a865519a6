"""Finding the logits in what a network of a user's own returns."""

import pytest
import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.models import build
from tests.helpers.networks import MODULE, check_own, get_one_line_message

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def build_own(name: str, output: str = "") -> nn.Module:
    """Build a network with the weights of seed 0."""
    torch.manual_seed(0)
    return build(f"{MODULE}:{name}", 10, 1, 8, output)


def compute_expected() -> torch.Tensor:
    """The logits of the network inside every wrapper."""
    logits: torch.Tensor = build_own("plain")(X)
    return logits


@pytest.mark.parametrize(
    "name",
    [
        *("one_tuple", "one_list", "with_features", "with_none", "named_tuple", "dictionary", "ordered"),
        *("dataclass_result", "slotted", "property_result"),
    ],
)
@pytest.mark.parametrize("is_training", [True, False])
def test_the_logits_of_a_clear_output_are_found(name: str, is_training: bool) -> None:
    assert torch.equal(build_own(name).train(is_training)(X), compute_expected())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two_logits", ("a tuple (0: [4, 10], 1: [4, 10])", "is not clear", "--output 0")),
        ("two_keys", ("a dict (cls: [4, 10], dist: [4, 10])", "--output cls")),
        ("unnamed_tuple", ("a Unnamed (scores: [4, 10], aux: [4, 10])", "--output scores")),
        ("scores", ("a Scores (scores: [4, 10])", "--output scores")),
        ("nested", ("a tuple (0: tuple, 1: [4, 32])", "--output KEY or INDEX")),
        ("nothing", ("returns None", "return a tensor [B, K]")),
        ("text", ("returns a str", "return a tensor [B, K]")),
        ("numpy_array", ("returns a ndarray", "return a tensor [B, K]")),
        ("not_logits", ("a dict (logits: str)", "return a tensor [B, K]")),
        ("spatial", ("outputs [4, 10, 1, 1], not logits [B, 10]",)),
    ],
)
def test_an_output_without_clear_logits_is_refused_in_one_line(name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as error:
        build_own(name).eval()(X)
    message = get_one_line_message(error)
    assert f"arch '{MODULE}:{name}'" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "key", "factor"),
    [
        ("two_logits", "0", 1.0),
        ("two_logits", "1", 0.5),
        ("two_logits", "-1", 0.5),
        ("two_keys", "cls", 1.0),
        ("two_keys", "dist", 0.5),
        ("two_keys", "1", 0.5),
        ("unnamed_tuple", "aux", 0.5),
        ("unnamed_tuple", "0", 1.0),
        ("scores", "scores", 1.0),
        ("named_tuple", "aux", 0.5),
        ("dictionary", "logits", 1.0),
    ],
)
def test_output_names_the_element(name: str, key: str, factor: float) -> None:
    assert torch.equal(build_own(name, key).eval()(X), compute_expected() * factor)


@pytest.mark.parametrize(
    ("name", "key"), [("two_logits", "2"), ("two_logits", "logits"), ("two_keys", "klass"), ("with_none", "1")]
)
def test_an_output_that_does_not_exist_is_refused_with_those_that_do(name: str, key: str) -> None:
    with pytest.raises(UsageError, match=rf"--output {key}: arch '.*' returns a (tuple|dict) \("):
        build_own(name, key).eval()(X)


@pytest.mark.parametrize(
    ("name", "key", "factor"),
    [
        ("aux_in_training", "", 1.0),
        ("named_in_training", "", 1.0),
        ("dict_in_training", "", 1.0),
        ("dist_in_training", "", 1.0),
        ("aux_first", "1", 1.0),
        ("aux_first", "", 0.5),
        ("unclear_in_training", "main", 1.0),
    ],
)
def test_a_network_with_other_outputs_in_training_trains_its_logits_and_says_so(
    name: str, key: str, factor: float
) -> None:
    network = build_own(name, key)
    assert torch.equal(network.train()(X), compute_expected() * factor)
    assert torch.equal(network.eval()(X), compute_expected())
    (note,) = check_own(name, output=key)
    assert "in training: its logits are trained, its other outputs are not" in note


def test_an_unclear_output_in_training_is_refused_before_the_training() -> None:
    with pytest.raises(UsageError, match=r"returns in training a dict \(main: \[2, 10\], aux: .*--output main"):
        check_own("unclear_in_training")


def test_a_state_dict_has_the_names_of_the_network_itself() -> None:
    assert list(build_own("dictionary").state_dict()) == [f"net.{name}" for name in build_own("plain").state_dict()]
