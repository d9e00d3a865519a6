"""`--data` with a path alone suggests the source that reads it; options of folders are for folders."""

from pathlib import Path

import pytest

from softcache.base.errors import UsageError
from softcache.data.sources import parse_data
from softcache.data.transfer_set import load_transfer_set


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("pets", "--data folder:pets"),
        ("./pets", "--data folder:pets"),
        ("my pets", "--data 'folder:my pets'"),
        ("pets/labels.csv", "--data folder:pets, which reads the images beside labels.csv"),
    ],
)
def test_a_path_without_a_source_suggests_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, suggestion: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pets", "my pets"):
        Path(name).mkdir()
    Path("pets/labels.csv").write_text("file,label\n")
    with pytest.raises(UsageError) as raised:
        parse_data(path)
    assert suggestion in str(raised.value)


@pytest.mark.parametrize("path", ["nowhere", "notes.txt"])
def test_what_no_source_reads_is_an_unknown_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("")
    with pytest.raises(UsageError, match="no data set"):
        parse_data(path)


@pytest.mark.parametrize("layout", ["basic", "unlabelled"])
def test_a_layout_is_refused_with_other_data(layout: str) -> None:
    with pytest.raises(UsageError, match=r"--layout is for --data .*folder:PATH.*, not for digits"):
        load_transfer_set("digits", Path(), val_fraction=0.1, layout=layout)
