"""The table of default settings: a row for every data source, made of settings that the commands accept."""

import pytest

from softcache.base.errors import UsageError
from softcache.data.sources import DATASET, SOURCES
from softcache.data.views.policy import parse_views
from softcache.pipeline.losses import parse_losses
from softcache.stages.cli.defaults import DEFAULTS, find_defaults


def test_every_data_source_has_defaults() -> None:
    assert set(DEFAULTS) == {*SOURCES, DATASET}


@pytest.mark.parametrize("source", DEFAULTS)
def test_defaults_are_settings_that_the_commands_accept(source: str) -> None:
    defaults = DEFAULTS[source]
    assert parse_views(defaults.views).size == parse_views(defaults.teacher_views).size == 0
    assert len(parse_losses(defaults.losses)) == len(defaults.losses)
    assert 0 < defaults.val_fraction < 1


def test_defaults_are_found_by_the_name_of_the_data() -> None:
    assert find_defaults("digits") is DEFAULTS["digits"]
    assert find_defaults("folder:some/path") is DEFAULTS["folder"]
    with pytest.raises(UsageError, match="no data set 'digit'"):
        find_defaults("digit")
