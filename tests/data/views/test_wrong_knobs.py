"""Wrong values of the augmentations of --views end in one line that says what is wrong."""

import numpy as np
import pytest

from softcache.base.errors import UsageError
from softcache.data.views.policy import check_policy, parse_views, read_views


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("crop:cutmix=-1", "views 'crop:cutmix=-1': cutmix=-1 is outside 0 to 4096"),
        ("crop:cutmix=nan", "cutmix=nan is not finite"),
        ("crop:cutmix", "'cutmix' is not parameter=value"),
        ("crop:cutmixx=1", "no parameter 'cutmixx' of views 'crop'. Did you mean 'cutmix'?"),
        ("crop:randaugment=2", "views 'crop:randaugment=2': randaugment=2 is not OPERATIONSxMAGNITUDE, such as 2x9"),
        ("crop:randaugment=2x", "randaugment=2x is not OPERATIONSxMAGNITUDE"),
        ("crop:randaugment=2x9.5", "randaugment=2x9.5 is not OPERATIONSxMAGNITUDE"),
        ("crop:randaugment=-2x9", "randaugment=-2x9 is not OPERATIONSxMAGNITUDE"),
        ("crop:randaugment=2x31", "randaugment=2x31 is outside 1x0 to 16x30: operations and magnitude"),
        ("crop:randaugment=0x9", "randaugment=0x9 is outside 1x0 to 16x30"),
        ("crop:randaugment=99999x9", "randaugment=99999x9 is not OPERATIONSxMAGNITUDE"),
        ("crop:randaugment=²x9", "randaugment=²x9 is not OPERATIONSxMAGNITUDE"),
        ("crop:jitter=1.5", "jitter=1.5 is outside 0 to 1"),
        ("crop:jitter=strong", "jitter=strong is not a number"),
        ("crop:hue=0.6", "hue=0.6 is outside 0 to 0.5"),
        ("crop:gray=2", "gray=2 is outside 0 to 1"),
        ("crop:erasing=-0.1", "erasing=-0.1 is outside 0 to 1"),
        ("crop:erasing=0.1,erasing=0.2", "'erasing' is given twice"),
        ("multi-crop:global=1.5", "global=1.5 is not a whole number"),
        ("multi-crop:local=-1", "local=-1 is outside 0 to 4096"),
        ("multi-crop:global=0,local=0", "global=0 and local=0: no crop is left, one of both is at least 1"),
        ("multi-crop:min_scale=0.5", "min_scale=0.5 is above global_scale=0.4: local crops are between"),
        ("multi-crop:global_scale=2", "global_scale=2 is outside 0.001 to 1"),
        ("multi-crop:revision=1", "revision=1 is of resized-crop-flip alone: leave it out"),
        ("resized-crop-flip:global=2", "no parameter 'global' of views 'resized-crop-flip'"),
        ("noise:cutmix=1", "no parameter 'cutmix' of views 'noise'"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_views(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("knob", ["randaugment=2x9", "jitter=0.4", "hue=0.1", "gray=0.2", "erasing=0.25", "cutmix=1"])
def test_rows_of_numbers_have_no_augmentation_of_images(knob: str) -> None:
    with pytest.raises(UsageError, match=rf"views: {knob}(\.0)? is for images, the data are rows of numbers \[3\]"):
        check_policy(parse_views(f"none:{knob}"), (3,))
    with pytest.raises(UsageError, match="'multi-crop' are for images"):
        check_policy(parse_views("multi-crop"), (3,))
    check_policy(parse_views(f"none:{knob}"), ())


@pytest.mark.parametrize(
    "spec",
    [
        "crop-flip:randaugment=2x9,jitter=0.4,hue=0.1,gray=0.2,erasing=0.25,cutmix=1,mixup=0.2",
        "multi-crop:global=1,local=3,erasing=0.5",
        "multi-crop",
    ],
)
def test_a_policy_is_read_from_what_an_identity_records(spec: str) -> None:
    policy = parse_views(spec)
    assert read_views({"policy": policy.name, **policy.parameters(), "seed": 3}) == policy
    assert policy.without_augmentation() == parse_views("none")
    assert parse_views(f"{spec},size=8" if ":" in spec else f"{spec}:size=8").at_size(8).drawn_size == 0


def test_what_is_not_used_is_not_recorded() -> None:
    assert parse_views("crop:erasing=0,jitter=0,cutmix=0").parameters() == parse_views("crop").parameters()
    assert parse_views("crop:randaugment=02x09").parameters()["randaugment"] == "2x9"
    assert set(parse_views("crop").parameters()) == {"pad", "mixup", "size", "resize"}
    assert np.array_equal(
        sorted(parse_views("crop:gray=0.5").parameters()), ["gray", "mixup", "pad", "resize", "size"]
    )
