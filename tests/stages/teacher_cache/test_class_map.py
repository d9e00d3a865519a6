"""A teacher's classes mapped to those of the data: `--class-map`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from softcache.base.errors import UsageError
from softcache.base.progress import no_progress
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.models import build
from softcache.pipeline.models.class_map import ClassMap
from softcache.pipeline.models.configurations import find_configuration
from softcache.stages.teacher_cache.teachers.class_maps import match_names
from tests.helpers.commands import Stages

FOLDERS = {  # ten folders, and the columns of ImageNet that stand for each
    "tench": [0],
    "goldfish": [1],
    "Tiger_Cat": [282],
    "cats": [281, 283, 284, 285],
    "golden-retriever": [207],
    "shark": [2, 3],
    "volcano": [980],
    "toilet tissue": [999],
    "espresso": [967],
    "cup": [968],
}
COMMAND = ("teacher-cache", "--data", "folder:pets", "--views", "none", "--draws", "1", "--normalize", "none")


@pytest.fixture
def pets(stages: Stages, save_image: Callable[..., Any]) -> tuple[str, ...]:
    """A folder `pets` of ten classes of 8 x 8 pixels; wide.pt, an mlp for 1,000 classes; map.csv. The classes."""
    classes = tuple(sorted(FOLDERS))
    for split, count in (("train", 6), ("test", 4)):
        for c, name in enumerate(classes):
            for k in range(count):
                save_image(Path("pets") / split / name / f"{k}.png", k=100 * count + 10 * k + c)
    torch.manual_seed(0)
    torch.save(build("mlp:16", 1000, 3, 8).state_dict(), "wide.pt")
    lines = [f"{name},{column}" for name, columns in FOLDERS.items() for column in columns]
    Path("map.csv").write_text("class,teacher class\n# a comment\n" + "\n".join(lines) + "\n")
    return classes


def read_logits(cache: str, split: str = "test") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the views uint8, labels and stored logits of a split of a cache."""
    reader = CacheReader(Path(cache))
    rows = reader.load_transfer_set("folder:pets", Path("datasets"), no_progress).splits[split]
    positions = np.arange(len(rows))
    index = reader.index_at(split, positions).astype(np.int64)
    logits = reader.read_stored(split, 0, positions)[0]
    return rows.images.load_plain(index, 8, 0), torch.from_numpy(rows.labels[index]), logits


def compute_mapped(views: torch.Tensor, classes: tuple[str, ...], weights: str = "wide.pt") -> torch.Tensor:
    """Return the logits of the classes, computed by hand from those of 1,000."""
    network = build("mlp:16", 1000, 3, 8).eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    with torch.no_grad():
        logits = network(views / 255).double()
    return torch.stack([logits[:, FOLDERS[name]].exp().sum(1).log() for name in classes], 1)


def test_a_teacher_of_1000_classes_has_the_accuracy_on_10_folders_that_is_computed_by_hand(
    stages: Stages, pets: tuple[str, ...]
) -> None:
    teacher = ("--teacher", "mlp:16", "--weights", "wide.pt", "--class-map", "map.csv", "--codec", "float32")
    result = stages(*COMMAND, *teacher, "--out", "c")
    views, labels, logits = read_logits("c")
    expected = compute_mapped(views, pets)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)
    assert result["teacher"]["test"]["accuracy"] == float((expected.argmax(1) == labels).double().mean())
    manifest = json.loads(Path("c/manifest.json").read_text())
    assert manifest["identity"]["teacher"]["class_map"] == [FOLDERS[name] for name in pets]
    assert manifest["settings"]["class_map"] == "map.csv"
    assert manifest["head"] is None
    error = stages.fails(2, "student", "--cache", "c", "--data", "folder:pets", "--arch", "mlp:8", "--loss", "srrl")
    assert "\n" not in error
    stages("check-cache", "c", "--deep", "--data", "folder:pets", "--weights", "wide.pt")
    stages("student", "--cache", "c", "--data", "folder:pets", "--arch", "mlp:8", "--epochs", "1", "--out", "s")
    code, out, _ = stages.call(*COMMAND, *teacher, "--out", "c", "--taps", "hidden1")
    assert code == 0
    assert "class map: 14 of the teacher's 1,000 classes are used: Tiger_Cat = 282; cats = 281 + 283 + 284 + 1" in out


def test_the_same_map_is_the_same_cache_in_every_form(stages: Stages, pets: tuple[str, ...]) -> None:
    teacher = ("--teacher", "mlp:16", "--weights", "wide.pt")
    stages(*COMMAND, *teacher, "--class-map", "map.csv", "--out", "c")
    reversed_lines = [line.replace(",", "\t") for line in Path("map.csv").read_text().splitlines()[:1:-1]]
    Path("map.tsv").write_text("\n".join(reversed_lines))
    assert "is complete" in stages.call(*COMMAND, *teacher, "--class-map", "map.tsv", "--out", "c")[1]
    Path("other.csv").write_text(Path("map.csv").read_text().replace("cup,968", "cup,969"))
    assert "teacher.class_map" in stages.fails(1, *COMMAND, *teacher, "--class-map", "other.csv", "--out", "c")


def test_probabilities_are_summed(stages: Stages, pets: tuple[str, ...]) -> None:
    """A file of probabilities of 1,000 classes: those of a class are added, and they may sum to less than 1."""
    names = [f"{s}/{name}/{k}.png" for s, count in (("train", 6), ("test", 4)) for name in pets for k in range(count)]
    probabilities = np.random.default_rng(0).dirichlet(np.full(1000, 0.1), len(names)).astype("f4")
    np.savez("p.npz", logits=probabilities, names=np.array(names))
    command = (*COMMAND, "--teacher", "logits:p.npz", "--class-map", "map.csv", "--codec", "float32", "--out", "c")
    assert "--outputs probabilities" in stages.fails(2, *command)
    stages(*command, "--outputs", "probabilities")
    logits = read_logits("c")[2]
    expected = np.stack([probabilities[60:][:, FOLDERS[name]].sum(1) for name in pets], 1)
    index = CacheReader(Path("c")).index_at("test", np.arange(40))
    np.testing.assert_allclose(logits.exp().numpy(), expected[index], rtol=1e-4, atol=1e-30)


def test_a_published_teacher_is_matched_by_name(
    stages: Stages, save_image: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"Golden_Retriever": 207, "tiger cat": 282, "toilet-tissue": 999}
    for split, count in (("train", 4), ("test", 2)):
        for c, name in enumerate(folders):
            for k in range(count):
                save_image(Path("pets") / split / name / f"{k}.png", 32, 32, k=100 * count + 10 * k + c)
    torch.manual_seed(0)
    state = torchvision.models.get_model("squeezenet1_1", weights=None).state_dict()
    weights = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT
    monkeypatch.setattr(weights, "get_state_dict", lambda **_: state)
    command = ("teacher-cache", "--data", "folder:pets", "--teacher", "torchvision:squeezenet1_1", "--draws", "1")
    command = (*command, "--views", "none:size=64", "--out", "c")
    assert "output 1000 classes, the data have 3: --class-map names" in stages.fails(
        2, *command, "--weights", "DEFAULT"
    )
    stages(*command, "--weights", "DEFAULT", "--class-map", "names")
    identity = json.loads(Path("c/manifest.json").read_text())["identity"]
    assert identity["teacher"]["class_map"] == [[folders[name]] for name in identity["transfer_set"]["classes"]]
    stages("check-cache", "c", "--deep", "--data", "folder:pets", "--weights", "DEFAULT")


def test_the_classes_of_a_run_are_put_in_the_order_of_the_data(stages: Stages, pets: tuple[str, ...]) -> None:
    orders = {"a.txt": pets, "b.txt": pets[::-1]}
    for name, classes in orders.items():
        Path(name).write_text("\n".join(classes))
    data = ("--data", "folder:pets")
    train = ("--arch", "mlp:8", "--epochs", "1", "--views", "none", "--normalize", "none")
    stages("teacher", *data, *train, "--classes", "a.txt", "--out", "t")
    command = ("teacher-cache", *data, "--weights", "t", "--views", "none", "--draws", "1")
    stages(*command, "--classes", "a.txt", "--class-map", "names", "--out", "a")
    assert "class_map" not in json.loads(Path("a/manifest.json").read_text())["identity"]["teacher"]
    assert "--class-map names" in stages.fails(1, *command, "--classes", "b.txt", "--out", "b")
    stages(*command, "--classes", "b.txt", "--class-map", "names", "--out", "b")
    a, b = (read_logits(cache) for cache in "ab")
    order = [int(np.flatnonzero((a[0] == view).flatten(1).all(1))[0]) for view in b[0]]
    assert torch.equal(a[2][order].flip(1), b[2])


def test_a_network_of_a_users_own_is_built_for_its_own_number_of_classes(
    stages: Stages, pets: tuple[str, ...], user_folder: Path
) -> None:
    Path("own_network.py").write_text(
        "from torch import nn\n\n\ndef make(classes, channels, size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, classes))\n"
    )
    torch.manual_seed(1)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 1000))
    torch.save(network.state_dict(), "own.pt")
    stages(
        *COMMAND,
        *("--teacher", "own_network:make", "--weights", "own.pt", "--class-map", "map.csv", "--codec", "float32"),
        *("--out", "c"),
    )
    views, _, logits = read_logits("c")
    with torch.no_grad():
        outputs = network(views / 255)
    expected = torch.stack([outputs[:, FOLDERS[name]].logsumexp(1) for name in pets], 1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    import softcache

    cache = softcache.build_cache(
        "live", network, "folder:pets", views="none", draws=1, normalize="none", codec="float32", class_map="map.csv"
    )
    assert torch.equal(read_logits("live")[2], logits)
    assert cache.num_classes == 10


def test_columns_are_summed_as_probabilities_are() -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    mapped = ClassMap([[3], [0, 7, 5], [1, 2]])(logits)
    probabilities = logits.softmax(1)
    sums = torch.stack([probabilities[:, 3], probabilities[:, [0, 7, 5]].sum(1), probabilities[:, [1, 2]].sum(1)], 1)
    torch.testing.assert_close(mapped.softmax(1), sums / sums.sum(1, keepdim=True))
    assert torch.equal(mapped[:, 0], logits[:, 3])
    assert torch.equal(ClassMap([[2], [1]])(logits), logits[:, [2, 1]])
    with pytest.raises(UsageError, match="uses class 8 of the teacher, which outputs 8"):
        ClassMap([[8]])(logits)


@pytest.mark.parametrize(
    ("name", "names", "column"),
    [
        ("cat", ["dog", "cat"], 1),
        ("Tabby_Cat", ["dog", "tabby cat"], 1),
        ("great-white shark", ["tench", "great white shark, white shark, man-eater"], 1),
        ("white shark", ["tench", "great white shark, white shark"], 1),
        ("n02084071", ["n01440764 tench", "n02084071 dog"], 1),
        ("n02084071-dog", ["n01440764", "n02084071"], 1),
        ("dog", ["n01440764 tench", "n02084071 dog"], 1),
        ("shark", ["shark, fish", "shark"], 1),  # a whole name before a synonym
        ("Ärger", ["ÄRGER", "x"], 0),
    ],
)
def test_a_name_is_matched(name: str, names: list[str], column: int) -> None:
    assert match_names([name], names) == [[column]]


def test_names_of_imagenet_match_themselves_and_those_with_several_meanings_are_refused() -> None:
    configuration = find_configuration("torchvision:resnet18")
    assert configuration
    names = list(configuration.class_names)
    assert match_names(names, names) == [[column] for column in range(1000)]
    assert (names[264], names[474]) == ("Cardigan", "cardigan")  # a dog, and no dog
    with pytest.raises(UsageError, match="'crane' of the data matches several of the teacher's, 0 'crane, bird', 2"):
        match_names(["crane"], ["crane, bird", "cat", "crane, machine"])
    with pytest.raises(UsageError, match="1 of 2 classes of the data are none of the teacher's 2: 'catt'"):
        match_names(["catt", "dog"], ["cat", "dog"])


FILES = {
    "unknown class": ("birds,3", "the data have no class 'birds'"),
    "similar class": ("cts,3", "did you mean 'cats'?"),
    "number too large": ("cup,1000", "the teacher has no class 1000: it outputs 1000"),
    "negative": ("cup,-1", "is a name, and those of the teacher's classes are not known"),
    "name": ("cup,mug", "is a name, and those of the teacher's classes are not known"),
    "one column": ("cup", "'cup' is not a class of the data and one of the teacher"),
    "three columns": ("cup,1,2", "is not a class of the data and one of the teacher"),
    "empty cell": ("cup,", "is not a class of the data and one of the teacher"),
    "twice": ("cup,968", "'968' is there twice for 'cup'"),
    "two classes": ("cup,0", "the teacher's class 0 stands for 'cup' and 'tench'"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_line_that_does_not_fit_is_refused_in_one_line(stages: Stages, pets: tuple[str, ...], name: str) -> None:
    line, expected = FILES[name]
    with open("map.csv", "a") as file:
        file.write(f"{line}\n")
    teacher = ("--teacher", "mlp:16", "--weights", "wide.pt", "--class-map", "map.csv")
    error = stages.fails(2, *COMMAND, *teacher, "--out", "c")
    assert "\n" not in error
    assert expected in error


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--class-map", ""), "--class-map names"),
        (("--class-map", "none.csv"), "no file 'none.csv'"),
        (("--class-map", "names"), "names of the teacher's 1000 classes are not known"),
        (("--class-map", "part.csv"), "9 of 10 classes have no line: 'Tiger_Cat', 'cats', 'espresso' and 6 more"),
        (("--class-map", "pets"), "no file 'pets'"),
        (("--weights", ""), "needs --weights"),
        (("--class-map", "narrow.csv"), "no class 500"),
        (("--class-map", "wide.pt"), "no text"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_in_one_line(
    stages: Stages, pets: tuple[str, ...], options: tuple[str, ...], expected: str
) -> None:
    Path("part.csv").write_text("cup,3\n")
    Path("narrow.csv").write_text("cup,500\n")
    torch.save(build("mlp:16", 20, 3, 8).state_dict(), "narrow.pt")
    weights = "narrow.pt" if "narrow.csv" in options else "wide.pt"
    arguments = {"--teacher": "mlp:16", "--weights": weights, "--class-map": "map.csv"}
    arguments |= dict(zip(options[::2], options[1::2], strict=True))
    given = [word for option, value in arguments.items() if value for word in (option, value)]
    code, _, error = stages.call(*COMMAND, *given, "--out", "c")
    assert code in (1, 2)
    assert error.count("\n") == 1, error
    assert expected in error
