"""View policies as they are written on the command line."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softcache.base.errors import UsageError
from softcache.data.views.policy import VIEW_POLICIES, parse_views, read_views


def test_a_spec_sets_the_parameters_that_it_names_and_no_others() -> None:
    policy = parse_views("crop-flip:pad=2,mixup=0.2,size=32")
    assert (policy.name, policy.crop, policy.flip, policy.pad) == ("crop-flip", True, True, 2)
    assert policy.parameters() == {"pad": 2, "mixup": 0.2, "size": 32, "resize": 0}
    resized = {"min_scale": 0.08, "mixup": 0, "size": 0, "resize": 0}
    assert parse_views("resized-crop-flip").parameters() == {**resized, "revision": 2}
    assert parse_views("resized-crop-flip:revision=1").parameters() == resized, "as in identities without a revision"
    assert read_views({"policy": "resized-crop-flip", **resized, "seed": 3}).revision == 1
    assert read_views({"policy": "resized-crop-flip", **resized, "seed": 3, "revision": 2}).revision == 2
    assert parse_views("crop").parameters()["pad"] == 4
    assert [isinstance(policy.parameters()[name], int) for name in ("pad", "size")] == [True, True]


@settings(deadline=None)
@given(st.data())
def test_parameters_of_a_policy_are_those_of_its_spec(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(VIEW_POLICIES)))
    ranges = {
        "pad": st.integers(0, 4096),
        "size": st.integers(0, 4096),
        "resize": st.integers(0, 4096),
        "min_scale": st.floats(0.001, 1),
        "mixup": st.floats(0, 4096),
        "cutmix": st.floats(1e-3, 4096),
        "erasing": st.floats(1e-3, 1),
        "global": st.integers(1, 4096),
        "local": st.integers(0, 4096),
        "global_scale": st.just(1.0),
        "randaugment": st.builds("{}x{}".format, st.integers(1, 16), st.integers(0, 30)),
        "jitter": st.floats(1e-3, 1),
        "hue": st.floats(1e-3, 0.5),
        "gray": st.floats(1e-3, 1),
        "std": st.floats(1e-6, 1000),
        "revision": st.just(2),
    }
    optional = {parameter: ranges[parameter] for parameter in VIEW_POLICIES[name].parameters()}
    parameters = data.draw(st.fixed_dictionaries({}, optional=optional))
    if name == "multi-crop" and "min_scale" in parameters:
        parameters["global_scale"] = 1.0  # which is not below min_scale
    spec = name + ":" * bool(parameters) + ",".join(f"{key}={value}" for key, value in parameters.items())
    assert parse_views(spec).parameters() == {**VIEW_POLICIES[name].parameters(), **parameters}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "crop-flop",
            "no view policy 'crop-flop'. Did you mean 'crop-flip'? There are: crop, crop-flip, multi-crop, noise,",
        ),
        ("", "no view policy ''. There are: crop"),
        (
            "crop:paddd=4",
            "no parameter 'paddd' of views 'crop'. Did you mean 'pad'? There are: cutmix, erasing, gray,",
        ),
        ("none:pad=4", "no parameter 'pad' of views 'none'"),
        ("resized-crop-flip:pad=4", "no parameter 'pad' of views 'resized-crop-flip'"),
        ("crop:min_scale=0.5", "no parameter 'min_scale' of views 'crop'"),
        ("crop:pad", "views 'crop:pad': 'pad' is not parameter=value"),
        ("crop:pad=", "views 'crop:pad=': 'pad=' is not parameter=value"),
        ("crop:pad=1,pad=2", "views 'crop:pad=1,pad=2': 'pad' is given twice"),
        ("crop:pad=four", "views 'crop:pad=four': pad=four is not a number"),
        ("crop:pad=nan", "pad=nan is not finite"),
        ("none:mixup=inf", "mixup=inf is not finite"),
        ("crop:pad=-1", "views 'crop:pad=-1': pad=-1 is outside 0 to 4096"),
        ("crop:pad=5000", "pad=5000 is outside 0 to 4096"),
        ("crop:pad=1.5", "views 'crop:pad=1.5': pad=1.5 is not a whole number"),
        ("none:size=32.5", "size=32.5 is not a whole number"),
        ("none:mixup=-0.1", "mixup=-0.1 is outside 0 to 4096"),
        ("resized-crop-flip:min_scale=0", "min_scale=0 is outside 0.001 to 1"),
        ("resized-crop-flip:revision=3", "revision=3 is outside 1 to 2"),
        ("resized-crop-flip:revision=1.5", "revision=1.5 is not a whole number"),
        ("crop:revision=1", "no parameter 'revision' of views 'crop'"),
        ("resized-crop-flip:min_scale=1.5", "min_scale=1.5 is outside 0.001 to 1"),
    ],
)
def test_the_message_for_a_bad_spec_is_one_line_that_names_the_fault(spec: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_views(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@settings(deadline=None)
@given(st.text(st.characters(codec="ascii"), max_size=30) | st.from_regex(r"(none|crop)(:[a-z_]{1,7}=?[-0-9.e,]*)?"))
def test_any_text_gives_a_policy_or_a_usage_error(spec: str) -> None:
    try:
        policy = parse_views(spec)
    except UsageError:
        return
    assert policy.name in VIEW_POLICIES
