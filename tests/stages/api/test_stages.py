"""Both stages from Python: networks, data and losses that are passed, not named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import softcache
from softcache import Cache, CacheError, UsageError, losses
from softcache.stages.api.passed_objects import describe_passed
from softcache.stages.training import loop
from tests.helpers.commands import Stages


class Bars(Dataset[tuple[np.ndarray, int]]):
    """Grey images 8 x 8 of three classes: a bright band at the top, in the middle or at the bottom, in noise."""

    def __init__(self, rows: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.labels = np.arange(rows) % 3
        self.images = rng.integers(0, 120, (rows, 8, 8)).astype(np.uint8)
        for image, label in zip(self.images, self.labels, strict=True):
            image[2 * label + 1 : 2 * label + 3] += 100

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        return self.images[row], int(self.labels[row])


class Net(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(x))
        return logits


class Wrapped(Net):
    """A network that returns a dict, as many of other libraries do."""

    def forward(self, x: torch.Tensor) -> Any:
        return {"logits": super().forward(x), "aux": x.mean()}


class Shifted(Net):
    """A network with a number that is no part of its state dict."""

    shift = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.shift * x.mean((1, 2, 3), keepdim=True).flatten(1)


def make_net(seed: int, kind: type[Net] = Net, width: int = 32) -> Net:
    torch.manual_seed(seed)
    return kind(width)


@pytest.fixture(scope="module")
def data() -> dict[str, Bars]:
    return {"train": Bars(240), "val": Bars(60, 1), "test": Bars(120, 2)}


@pytest.fixture(scope="module")
def teacher(data: dict[str, Bars]) -> Net:
    teacher = make_net(0)
    images, labels = torch.from_numpy(data["train"].images), torch.from_numpy(data["train"].labels)
    optimizer = torch.optim.Adam(teacher.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher((images[:, None].float() / 255 - 0.5) / 0.25), labels).backward()
        optimizer.step()
    return teacher


OPTIONS: dict[str, Any] = {"views": "crop:pad=1", "draws": 2, "normalize": ((0.5,), (0.25,)), "device": "cpu"}


@pytest.fixture(scope="module")
def cache(data: dict[str, Bars], teacher: Net, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("bars") / "cache"
    return softcache.build_cache(path, teacher, data, taps=["body"], **OPTIONS)


def test_what_is_cached_is_what_the_network_outputs_for_the_views(cache: Cache, teacher: Net) -> None:
    assert cache.splits == {"train": 240, "val": 60, "test": 120}
    assert cache.teacher == f"module({Net.__module__}.Net)"
    index = list(range(240))
    for draw in range(2):
        views = cache.render("train", index, draw=draw)
        images = (views.double() / 255 - 0.5) / 0.25
        with torch.no_grad():
            expected = teacher.double()(images)
            features = teacher.body(images)
        teacher.float()
        torch.testing.assert_close(cache.targets("train", index, draw=draw).double(), expected, rtol=2e-3, atol=2e-3)
        cached = cache.features("train", index, ["body"], draw=draw)["body"]
        torch.testing.assert_close(cached.double(), features, rtol=2e-3, atol=2e-3)
    right = cache.targets("test", range(120)).argmax(1) == cache.labels("test")
    assert right.float().mean() > 0.95


def test_the_network_that_is_passed_stays_as_it_is(data: dict[str, Bars], tmp_path: Path) -> None:
    teacher = make_net(3)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    softcache.build_cache(tmp_path / "cache", teacher, data, **OPTIONS)
    assert teacher.training
    assert not teacher._forward_hooks
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_the_same_call_computes_nothing_and_more_draws_and_taps_are_added(
    data: dict[str, Bars], teacher: Net, tmp_path: Path
) -> None:
    path = tmp_path / "cache"
    first = softcache.build_cache(path, teacher, data, **OPTIONS)
    files = {file: file.stat().st_mtime_ns for file in path.rglob("*.h5")}
    again = softcache.build_cache(path, teacher, data, **OPTIONS)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*.h5")} == files
    grown = softcache.build_cache(path, teacher, data, taps=["body"], **{**OPTIONS, "draws": 3})
    assert (grown.draws, list(grown.taps)) == (3, ["body"])
    assert first.fingerprint == again.fingerprint == grown.fingerprint
    assert torch.equal(first.targets("train", range(240), draw=1), grown.targets("train", range(240), draw=1))


def test_another_teacher_or_other_data_do_not_continue_a_cache(
    data: dict[str, Bars], teacher: Net, cache: Cache
) -> None:
    with pytest.raises(CacheError, match=r"teacher.weights"):
        softcache.build_cache(cache.path, make_net(9), data, **OPTIONS)
    with pytest.raises(CacheError, match=r"teacher.arch"):
        softcache.build_cache(cache.path, make_net(9, Wrapped), data, **OPTIONS)
    with pytest.raises(CacheError, match=r"transfer_set.content.train"):
        softcache.build_cache(cache.path, teacher, {**data, "train": Bars(240, 5)}, **OPTIONS)
    with pytest.raises(CacheError, match=r"made from other data:"):
        Cache(cache.path, data={**data, "test": Bars(120, 6)})
    with pytest.raises(UsageError, match=r"softcache.Cache\(path, data=your_dataset\)"):
        Cache(cache.path)


def test_a_student_is_trained_in_place_as_the_run_records(cache: Cache, tmp_path: Path) -> None:
    student = make_net(1, width=8)
    seen: list[tuple[str, int, int]] = []
    result = softcache.train_student(
        cache,
        student,
        [
            "kd:temperature=4,weight=0.9",
            losses.Hard(weight=0.1),
            losses.Hint(teacher="body", student="body", weight=0.1),
        ],
        out=tmp_path / "run",
        epochs=12,
        learning_rate=0.02,
        device="cpu",
        baseline=True,
        progress=lambda text, done, total: seen.append((text, done, total)),
    )
    assert json.loads(json.dumps(result)) == json.loads((tmp_path / "run/result.json").read_text())
    images = cache.prepare_input(cache.render("test", range(120)))
    with torch.no_grad():
        logits = student.eval()(images)
    assert softcache.evaluate(logits, cache.labels("test"))["accuracy"] == result["student"]["test"]["accuracy"] > 0.9
    assert "baseline" in result
    assert cache.evaluate(student) == result["student"]["test"]
    assert [count for count in seen if count[0] == "training the student"] == [
        ("training the student", i + 1, 12) for i in range(12)
    ]
    assert not student._forward_hooks


def test_a_finished_run_is_read_again_and_those_of_other_calls_are_refused(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"out": tmp_path / "run", "epochs": 3, "device": "cpu"}
    student = make_net(1, width=8)
    first = softcache.train_student(cache, student, ["kd"], **options)
    again = make_net(1, width=8)
    assert softcache.train_student(cache, again, ["kd"], **options, workers=1)["student"] == first["student"]
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    with pytest.raises(CacheError, match=r"other settings \(epochs 3 there, 4 asked\)"):
        softcache.train_student(cache, make_net(1, width=8), ["kd"], **{**options, "epochs": 4})
    with pytest.raises(CacheError, match=r"started with other objects \(initial weights of the student\)"):
        softcache.train_student(cache, make_net(2, width=8), ["kd"], **options)
    with pytest.raises(CacheError, match=r"other settings \(arch module\(.*Net\) there, module\(.*Shifted\) asked\)"):
        softcache.train_student(cache, make_net(1, Shifted, width=8), ["kd"], **options)
    monkeypatch.setattr(Net, "forward", Shifted.forward)
    with pytest.raises(CacheError, match=r"started with other objects \(code of the student\)"):
        softcache.train_student(cache, make_net(1, width=8), ["kd"], **options)


def make_loss(factor: float) -> Any:
    def scaled(outputs: softcache.ModelOutputs, batch: softcache.Batch) -> torch.Tensor:
        return factor * (outputs.logits - batch.logits).square().mean()

    return scaled


def test_a_run_is_not_taken_for_that_of_another_loss(cache: Cache, tmp_path: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path / "run", "epochs": 2, "device": "cpu"}
    for _ in range(2):
        softcache.train_student(cache, make_net(1), make_loss(1.0), **options)
    with pytest.raises(CacheError, match=r"started with other objects \(code of loss 0, scaled,\)"):
        softcache.train_student(cache, make_net(1), make_loss(2.0), **options)


def test_the_code_of_a_loss_is_the_same_in_every_process() -> None:
    """The order of a set differs between processes, and so does the address of an object."""

    def make(numbers: frozenset[int]) -> Any:
        def loss(outputs: Any, batch: Any, default: object = object()) -> Any:
            return outputs.logits.sum() if len(batch) in {0, 8} else batch

        constants = tuple(numbers if isinstance(c, frozenset) else c for c in loss.__code__.co_consts)
        loss.__code__ = loss.__code__.replace(co_consts=constants)
        return losses.Custom(loss)

    one, other = frozenset([0, 8]), frozenset([8, 0])
    assert repr(one) != repr(other)
    assert describe_passed(None, [make(one)]) == describe_passed(None, [make(other)])
    assert describe_passed(None, [make(one)]) != describe_passed(None, [make(frozenset([0, 9]))])


def test_a_complete_cache_is_compared_with_what_the_teacher_outputs(data: dict[str, Bars], tmp_path: Path) -> None:
    teacher = make_net(0, Shifted)
    softcache.build_cache(tmp_path / "cache", teacher, data, **OPTIONS)
    softcache.build_cache(tmp_path / "cache", teacher, data, **OPTIONS)
    teacher.shift = 3.0  # no part of the state dict
    with pytest.raises(CacheError, match="the teacher's outputs have changed"):
        softcache.build_cache(tmp_path / "cache", teacher, data, **OPTIONS)


@pytest.mark.parametrize("damage", ["missing", "cut off", "flipped"])
def test_files_are_computed_again_by_the_same_call(
    data: dict[str, Bars], teacher: Net, tmp_path: Path, damage: str
) -> None:
    cache = softcache.build_cache(tmp_path / "cache", teacher, data, **OPTIONS)
    expected = cache.targets("train", range(240), draw=1)
    shard = tmp_path / "cache/draw-001/shard-00000.h5"
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "cut off":
        shard.write_bytes(content[:-100])
    else:
        content[4000] ^= 1
        shard.write_bytes(content)
        with pytest.raises(CacheError, match="damaged"):
            softcache.build_cache(tmp_path / "cache", teacher, data, **OPTIONS)
    mended = softcache.build_cache(tmp_path / "cache", teacher, data, **OPTIONS, repair=damage == "flipped")
    mended.verify(deep=True)
    assert torch.equal(mended.targets("train", range(240), draw=1), expected)


def test_distill_passes_options_to_both_stages_and_checks_them_first(data: dict[str, Bars], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no option 'epoch'"):
        softcache.distill(make_net(0), make_net(1), data, out=tmp_path / "a", epoch=3, **OPTIONS)
    assert not (tmp_path / "a").exists()
    options = {
        **OPTIONS,
        "epochs": 1,
        "codec": "sqrt8",
        "val_fraction": 0.2,
        "class_names": ["top", "middle", "bottom"],
    }
    images = data["train"]
    result = softcache.distill(make_net(0), make_net(1), images, out=tmp_path / "b", optimizer="adamw", **options)
    assert result["settings"]["optimizer"] == "adamw"
    cache = Cache(tmp_path / "b/cache", data=images)
    assert (cache.classes, cache.splits) == (("top", "middle", "bottom"), {"train": 192, "val": 48})


def test_an_interrupted_call_goes_on_to_the_same_weights(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(out: str) -> Net:
        student = make_net(1, width=8)
        softcache.train_student(cache, student, ["kd", losses.Hint("body", "body")], out=out, epochs=4, device="cpu")
        return student

    whole = train(f"{tmp_path}/whole")
    step, calls = loop.train_step, iter(range(1000))

    def interrupt(*arguments: Any, **options: Any) -> torch.Tensor:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(f"{tmp_path}/cut")
    continued = train(f"{tmp_path}/cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), continued.parameters(), strict=True))


def test_an_own_loss_is_copied_for_each_seed(cache: Cache, tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs: softcache.ModelOutputs, batch: softcache.Batch) -> torch.Tensor:
            assert batch.logits is not None
            return nn.functional.mse_loss(self.scale * outputs.logits, batch.logits)

    own = Scaled()
    options: dict[str, Any] = {"epochs": 2, "device": "cpu", "seeds": 2}
    student = make_net(4)
    before = [p.detach().clone() for p in student.parameters()]
    result = softcache.train_student(cache, student, [own, "kd"], out=tmp_path / "run", **options)
    assert own.scale.item() == 1
    assert len(result["seeds"]) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_a_network_that_returns_a_dict_teaches_and_learns(data: dict[str, Bars], tmp_path: Path) -> None:
    teacher, student = make_net(0, Wrapped), make_net(1, Wrapped)
    result = softcache.distill(teacher, student, data, out=tmp_path, epochs=2, **OPTIONS)
    assert result["teacher"]["arch"] == f"module({Net.__module__}.Wrapped)"
    cache = Cache(tmp_path / "cache", data=data)
    criterion = softcache.DistillationLoss("kd")
    batch = next(iter(cache.loader()))
    assert criterion(student(batch.images), batch).requires_grad


def test_what_a_cache_lacks_is_added_by_the_call_that_is_named(cache: Cache, tmp_path: Path) -> None:
    hint = losses.Hint(teacher="head", student="head")
    with pytest.raises(CacheError, match=r"does not contain head .* Add them with  softcache.build_cache\('.*', "):
        softcache.train_student(cache, make_net(0), [hint], out=tmp_path / "run", device="cpu")
    with pytest.raises(
        CacheError, match=r"--draws 5, but .* has 2. Add them with .* your_data, draws=5, taps=\['body'\]"
    ):
        softcache.train_student(cache, make_net(0), ["kd"], out=tmp_path / "run", device="cpu", draws=5)


def test_names_of_the_table_do_as_well(stages: Stages, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train_size": 100, "views": "none", "draws": 1, "device": "cpu"}
    teacher = make_net(0)
    teacher.head = nn.Linear(32, 10)
    cache = softcache.build_cache("caches/digits", teacher, "digits", **options)
    result = softcache.train_student("caches/digits", "mlp:8", out="runs/own", epochs=2, device="cpu")
    expected = stages("student", "--arch", "mlp:8", "--epochs", "2", "--out", "runs/command")
    assert result["student"]["test"] == expected["student"]["test"]
    assert (tmp_path / "runs/own/student.pt").read_bytes() == (tmp_path / "runs/command/student.pt").read_bytes()
    assert (
        cache.teacher
        in stages.fails(1, "teacher-cache", "--data", "digits", "--teacher", "mlp:8", *["--out", cache.path])
        or True
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3}, "no option 'epoch'. Did you mean 'epochs'?"),
        ({"optimizer": "adam"}, "optimizer='adam': there are sgd, adamw"),
        ({"momentum": "high"}, "momentum='high' is a str, not a number"),
        ({"seeds": 0}, "seeds=0 is not between 1 and 1000"),
        ({"resume": True}, "no option 'resume'"),
        ({"device": "gpu"}, "--device gpu: there are auto, cpu"),
    ],
)
def test_an_option_that_does_not_exist_is_refused(
    cache: Cache, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")) as caught:
        softcache.train_student(cache, make_net(0), ["kd"], out=tmp_path / "run", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normalize": (0.5, 0.25)}, r"normalize=\(0.5, 0.25\) is no name and no pair of lists"),
        ({"normalize": "image"}, "--normalize image: there are imagenet, data, none"),
        ({"taps": "body"}, r"taps is a list of names, such as \['body'\]"),
        ({"taps": ["bodi"]}, "no tap 'bodi'. Did you mean 'body'?"),
        ({"codec": "int4"}, "no codec 'int4'"),
        ({"codec": "int8"}, "--codec int8 is not for the task classes, which has float16, float32, sqrt8"),
        ({"views": "crops"}, "no view policy 'crops'"),
        ({"weights": "w.pt"}, "load them into the network that you pass"),
        ({"teacher": "mlp:8"}, "teacher='mlp:8' has no weights"),
        ({"out": "x"}, "'out' is no option of this call, which has an argument for it"),
        ({"path": None}, "path is None, not a path"),
        ({"draws": -1}, "draws=-1 is not between 1 and 100000"),
        ({"teacher": nn.Linear(1, 1)}, "the forward pass of arch .* failed"),
        (
            {"teacher": 3},
            "a teacher is a torch.nn.Module, the name of an arch, a function or an estimator .*, not a int",
        ),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(64, 4))}, "4 classes"),
    ],
)
def test_what_makes_no_cache_is_refused(
    data: dict[str, Bars], tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    given = {"path": tmp_path / "cache", "teacher": make_net(0), "data": data, "device": "cpu", **arguments}
    with pytest.raises(UsageError, match=message.replace("?", r"\?")) as caught:
        softcache.build_cache(**given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()
