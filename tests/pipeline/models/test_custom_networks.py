"""Networks of a user's own: which factories are taken, what their weights become, and how an error in them reads."""

from pathlib import Path

import pytest
import torch
from torch import nn

from softcache.base.errors import UsageError
from softcache.pipeline.models import build, count_parameters, is_custom_arch
from softcache.pipeline.models.multiply_adds import count_multiply_adds
from softcache.pipeline.models.network_checks import TrainingCheck, check_teacher, check_trainable
from softcache.pipeline.models.outputs import find_selector
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from softcache.pipeline.models.state_dicts import load_weights
from tests.helpers.networks import MODULE, check_own, compute_logits, get_one_line_message

FILE = "user_networks.py:"


def build_own(name: str, classes: int = 10, channels: int = 1, size: int = 8) -> nn.Module:
    """Build a network of tests/helpers/user_networks.py."""
    return build(f"{MODULE}:{name}", classes, channels, size)


# Factories


@pytest.mark.parametrize(
    "name",
    [
        *("plain", "positional", "reordered", "positional_only", "classes_alone", "no_arguments", "keywords", "rest"),
        *("with_defaults", "Net", "ready", "partial", "shorthand", "cached", "module_global", "Zoo.small"),
        *("scripted", "parallel", "prints_and_sets"),
    ],
)
def test_a_factory_is_called_with_the_arguments_that_it_takes(name: str) -> None:
    assert compute_logits(build_own(name), 1, 8).shape == (3, 10)
    check_own(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other_names", ("takes num_classes, in_chans", "factory(classes=…, channels=…, size=…, shape=…)")),
        ("raises", ("the factory of arch", "RuntimeError: weights of the hub", FILE, "in raises")),
        ("exits", ("SystemExit: usage: train.py", FILE)),
        ("deep_error", ("RuntimeError: Trying to create tensor with negative dimension", FILE, "in deep_error")),
        ("returns_none", ("returned None, not a torch.nn.Module",)),
        ("returns_a_pair", ("returned a tuple, not a torch.nn.Module",)),
        ("returns_a_class", ("returned a type, not a torch.nn.Module",)),
        ("not_a_factory", ("is a dict, neither a function nor a torch.nn.Module",)),
        ("Unfinished", ("AttributeError: cannot assign module before Module.__init__() call", FILE)),
        ("on_meta", ("weights on the device 'meta', which have no values",)),
        ("plian", ("has no attribute 'plian'", f"Did you mean '{MODULE}:plain'?")),
        ("UnusedLazy", ("has lazy layers that its forward pass does not run",)),
    ],
)
def test_a_factory_that_cannot_be_used_is_refused_in_one_line(name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as error:
        build_own(name)
    message = get_one_line_message(error)
    assert f"arch '{MODULE}:{name}'" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def make(:\n", ("SyntaxError", "broken_nets.py:1")),
        ("import torch\n\nraise OSError('no licence')\n", ("OSError: no licence", "broken_nets.py:3")),
        ("import a_library_that_is_missing\n", ("No module named 'a_library_that_is_missing'", "broken_nets.py:1")),
        ("from torch import not_there\n", ("ImportError: cannot import name 'not_there'", "broken_nets.py:1")),
        ("import sys\nsys.exit(0)\n", ("SystemExit: 0", "broken_nets.py:2")),
        ("import other_broken\n", ("ZeroDivisionError", "other_broken.py:1")),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_with_the_line_of_the_error(
    user_folder: Path, source: str, words: tuple[str, ...]
) -> None:
    (user_folder / "broken_nets.py").write_text(source)
    (user_folder / "other_broken.py").write_text("1 / 0\n")
    with pytest.raises(UsageError) as error:
        build("broken_nets:make", 10, 1, 8)
    message = get_one_line_message(error)
    assert message.startswith("arch 'broken_nets:make' cannot be imported: ")
    assert all(word in message for word in words), message


def test_a_module_that_is_no_factory_is_copied_for_each_student_and_that_is_noted() -> None:
    for name in ("ready", "cached", "module_global"):
        first, second = build_own(name), build_own(name)
        assert first is not second
        with torch.no_grad():
            next(first.parameters()).add_(1)
        assert not torch.equal(next(first.parameters()), next(second.parameters()))
        assert "every seed starts from its weights" in check_own(name)[0]
    assert check_own("plain") == []


def test_which_archs_are_code_of_the_user() -> None:
    assert all(map(is_custom_arch, ("nets:make", "a.b:c", "simkd(nets:make;layer;8)")))
    assert not any(map(is_custom_arch, ("mlp:8", "cnn", "torchvision:resnet18", "simkd(resnet8;layer3;64)", "a b:c")))


# Weights


def test_lazy_layers_get_their_shapes_and_weights_that_depend_on_the_seed() -> None:
    networks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        networks.append(build_own("lazy"))
    assert count_parameters(networks[0]) == 64 * 16 + 16 + 2 * 16 + 16 * 10 + 10
    states = [network.state_dict() for network in networks]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["1.weight"], states[2]["1.weight"])
    load_weights(networks[2], states[0], "a file")
    assert torch.equal(networks[2].state_dict()["1.weight"], states[0]["1.weight"])
    assert networks[0].training
    assert not int(states[0]["2.num_batches_tracked"])


@pytest.mark.parametrize(("name", "dtype"), [("half", "float16"), ("bfloat16", "bfloat16"), ("double", "float64")])
def test_weights_of_another_precision_are_used_in_float32(name: str, dtype: str) -> None:
    assert compute_logits(build_own(name), 1, 8).dtype == torch.float32
    assert f"has weights in {dtype}: they are used in float32" in check_own(name)[0]


def test_a_network_without_parameters_is_a_teacher_and_no_student() -> None:
    network = build_own("NoParameters")
    assert count_multiply_adds(network, 1, 8) == count_parameters(network) == 0
    assert check_teacher(PreparedModel(network, InputSpec(1, 8, (0.5,), (0.25,))).eval(), "nets:make", 10) == []
    for name in ("NoParameters", "frozen"):
        with pytest.raises(UsageError, match="has no trainable parameters: there is nothing to train"):
            check_own(name)


def test_building_and_checking_leave_the_random_generator_and_the_network_as_they_are() -> None:
    torch.manual_seed(3)
    network = build_own("rows_normalised")
    expected, state = torch.random.get_rng_state(), {k: v.clone() for k, v in network.state_dict().items()}
    check = TrainingCheck("a", 10, InputSpec(1, 8, (0.5,), (0.25,)), torch.device("cpu"), "float32", 2, 2)
    check_trainable(network, check)
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert network.training


# Forward and backward passes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Fixed", ("mat1 and mat2 shapes cannot be multiplied", FILE, "[B, 1, 8, 8]", "--views …:size=N")),
        ("three_channels", ("to have 3 channels, but got 1 channels", "[B, 1, 8, 8]")),
        ("FailsInTraining", ("failed in training mode: KeyError: 'targets'", FILE, "in forward")),
        ("FailsInEval", ("the forward pass of arch", "failed: NotImplementedError (", FILE)),
        ("FailsBackwards", ("the backward pass of arch", "modified by an inplace operation")),
        ("OwnGradient", ("ArithmeticError: a mistake in my own gradient", FILE, "in backward")),
        ("detached", ("its output in training mode has no gradient",)),
        ("spatial", ("outputs [2, 10, 1, 1]", "[B, 10]")),
        ("one_dimension", ("outputs [2]", "[B, 10]")),
        ("too_wide", ("outputs [2, 32] for 2 images", "it has 32 classes, the data have 10")),
        ("predicted", ("outputs int64, not floating-point logits",)),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused_in_one_line(name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as error:
        check_own(name)
    message = get_one_line_message(error)
    assert f"arch '{MODULE}:{name}'" in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "words"),
    [("rows_normalised", "Expected more than 1 value per channel when training"), ("squeezed", "outputs [10]")],
)
def test_a_batch_of_one_row_is_tried_where_the_training_has_one(name: str, words: str) -> None:
    check_own(name, least_rows=2)
    with pytest.raises(UsageError) as error:
        check_own(name, least_rows=1)
    message = get_one_line_message(error)
    assert "--batch-size 1 makes a batch of one row" in message
    assert words in message
    check_own("plain", least_rows=1)


def test_a_network_that_views_its_feature_map_is_run_with_contiguous_tensors() -> None:
    network = build_own("Views")
    spec = InputSpec(1, 8, (0.5,), (0.25,))
    views = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    assert PreparedModel(network, spec).eval()(views).shape == (4, 10)
    assert not PreparedModel(network, spec).prepare_input(views).is_contiguous(memory_format=torch.channels_last) or (
        spec.channels == 1
    )
    assert PreparedModel(build_own("Views", channels=3), InputSpec(3, 8, (0.5,) * 3, (0.25,) * 3)).eval()(
        views.expand(-1, 3, -1, -1)
    ).shape == (4, 10)
    check_own("Views")
    check_own("Views", channels=3)


def test_a_built_in_arch_has_no_selector_and_takes_no_output() -> None:
    assert find_selector(build("cnn", 10, 1, 8)) is None
    with pytest.raises(UsageError, match="--output logits is for networks of your own, and 'cnn' returns one tensor"):
        build("cnn", 10, 1, 8, "logits")
    with pytest.raises(UsageError, match=r"--output 0, but arch '.*:plain' returns one tensor: leave it out"):
        check_own("plain", output="0")


def test_a_factory_changes_no_state_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    build_own("prints_and_sets")
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert capsys.readouterr() == ("", "a line of my own\n")


# Names


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("resnet8:", "arch 'resnet8:' has nothing after its colon: 'resnet8'"),
        ("torchvision:", "has nothing after its colon: torchvision:NAME, such as torchvision:resnet18"),
        ("timm:", "has nothing after its colon: timm:NAME, such as timm:resnet18"),
        ("hf:", "has nothing after its colon: hf:NAME or hf:FOLDER"),
        ("mlp:99999999", "arch 'mlp:99999999' would have 7,399,999,926 weights, more than 1,000,000,000"),
        ("mlp:9" + "9" * 30, "weights, more than 1,000,000,000"),
        ("nets/small.py:make", "arch 'nets/small.py:make' names a file: name the module, as Python imports it"),
        ("./small.py:make", "as Python imports it: 'small:make'"),
        ("torchvision:resnet1", "Did you mean 'resnet18'?"),
    ],
)
def test_a_name_that_cannot_be_built_is_refused_in_a_short_line(arch: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        build(arch, 10, 1, 8)
    assert words in get_one_line_message(error)
    assert len(str(error.value)) < 300


def test_multiply_adds_of_a_network_that_needs_two_images_are_half_of_theirs() -> None:
    network = build_own("squeezed")
    assert count_multiply_adds(network, 1, 8) == count_multiply_adds(build_own("plain"), 1, 8) > 0
    assert network.training
