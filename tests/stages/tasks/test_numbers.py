"""Numbers through both stages: cached ones are those of the live teacher, in the units of the data."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import softcache
from softcache.data.tasks import measure_targets
from softcache.pipeline.batch import Batch, LossContext, ModelOutputs
from softcache.pipeline.losses import parse_losses
from softcache.pipeline.models import build
from softcache.pipeline.models.checkpoint_files import choose_state_dict, read_checkpoint
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from softcache.stages.cli.configs import StudentConfig
from softcache.stages.main import main
from softcache.stages.student.requirements import hide_labels
from tests.helpers.commands import Stages

N = 160
UNIT = np.array([1.0, 1e6])


def save_table(path: Path, units: Any = UNIT, unknown: bool = True) -> str:
    """Save 160 rows of 5 numbers with 2 numbers to predict, some of them unknown."""
    random = np.random.default_rng(0)
    x = random.normal(size=(N, 5)).astype(np.float32)
    y = (np.tanh(x[:, :2] + x[:, 2:4]) + 0.3 * random.normal(size=(N, 2)) + [3, -1]) * units
    if unknown:
        y[::7, 0] = y[::11, 1] = y[5] = np.nan
    split = np.where(np.arange(N) % 4 == 3, "test", "train")
    np.savez(path, x=x, y=y.astype(np.float32), split=split, classes=np.array(["angle", "mass"]))
    return f"arrays:{path}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with table.npz, a teacher of it and its cache of two draws."""
    folder = tmp_path_factory.mktemp("numbers")
    data = save_table(folder / "table.npz")
    main(["teacher", "--data", data, "--arch", "mlp:16", "--epochs", "30", "--out", f"{folder}/teacher"])
    options = ["--weights", f"{folder}/teacher", "--views", "noise:std=0.1,mixup=0.2", "--draws", "2"]
    main(["teacher-cache", "--data", data, *options, "--out", f"{folder}/cache"])
    return folder


def load_live_teacher(run: Path) -> PreparedModel:
    """Load the teacher of a run without the code of stage one."""
    record = json.loads((run / "result.json").read_text())["teacher"]
    spec = InputSpec.from_json(record["preparation"])
    network = build(record["arch"], 2, spec.channels, spec.size, shape=spec.shape)
    network.load_state_dict(choose_state_dict(read_checkpoint(run / "teacher.pt"), "", run)[1])
    return PreparedModel(network, spec).eval()


def check_equals_live(cache: softcache.Cache, teacher: PreparedModel) -> None:
    unit = torch.from_numpy(UNIT).float()
    for batch in cache.loader("train", batch_size=32):
        assert batch.logits is not None
        with torch.no_grad():
            live = teacher(batch.views)
        torch.testing.assert_close(batch.logits / unit, live / unit, rtol=1e-6, atol=1e-6)


def test_cached_numbers_are_those_of_the_live_teacher_also_after_growth_and_repair(
    made: Path, stages: Stages, tmp_path: Path
) -> None:
    data, run, teacher = f"arrays:{made / 'table.npz'}", made / "teacher", load_live_teacher(made / "teacher")
    y = np.load(made / "table.npz")["y"]
    assert np.nanstd(y[:, 1]) > 1e5 * np.nanstd(y[:, 0])
    assert teacher.input_spec.output_std[1] > 1e5 * teacher.input_spec.output_std[0]
    options = ("--weights", run, "--views", "noise:std=0.1,mixup=0.2")
    stages("teacher-cache", "--data", data, *options, "--draws", 2, "--out", "c")
    check_equals_live(softcache.Cache("c", data=data), teacher)
    stages("teacher-cache", "--data", data, *options, "--draws", 3, "--out", "c")
    cache = softcache.Cache("c", data=data)
    assert cache.draws == 3
    check_equals_live(cache, teacher)
    stages("check-cache", "c", "--data", data, "--weights", run, "--deep")
    shard = max((tmp_path / "c").rglob("*.h5"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    stages.fails(1, "check-cache", "c", "--data", data)
    stages("check-cache", "c", "--data", data, "--weights", run, "--repair")
    check_equals_live(softcache.Cache("c", data=data), teacher)


def train_by_hand(made: Path, spec: str, live: bool) -> list[float]:
    """Take 30 SGD steps with cached numbers, or with those of the live teacher on the same views."""
    torch.manual_seed(3)
    cache, teacher = (
        softcache.Cache(made / "cache", f"arrays:{made / 'table.npz'}"),
        load_live_teacher(made / "teacher"),
    )
    student = PreparedModel(build("mlp:8", 2, 5, 0, shape=(5,)), teacher.input_spec)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    loss = parse_losses((spec,))[0]
    context = LossContext(std=torch.tensor(teacher.input_spec.output_std))
    batches = [batch for _ in range(8) for batch in cache.loader("train", batch_size=27)][:30]
    assert len(batches) == 30
    history, part = [], loss.build_part(ModelOutputs(torch.zeros(2, 2)), batches[0], context)
    for batch in batches:
        with torch.no_grad():
            logits = teacher(batch.views) if live else batch.logits
        step = Batch(batch.index, batch.draw, batch.views, batch.labels, logits, {}, batch.partner, batch.share)
        value = loss(ModelOutputs(student(batch.views)), step, part)
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        history.append(float(value.detach()))
    return history


@pytest.mark.parametrize("spec", ["kd_mse", "bounded:margin=0.5"])
def test_thirty_steps_from_the_cache_equal_thirty_steps_with_the_live_teacher(made: Path, spec: str) -> None:
    cached, live = (train_by_hand(made, spec, live=live) for live in (False, True))
    worst = max(abs(a - b) / b for a, b in zip(cached, live, strict=True) if b)
    assert cached[-1] < cached[0]
    print(f"{spec}: largest relative difference of 30 losses {worst:.1e}")
    assert worst <= 1e-6


def test_outputs_are_standardised_by_the_targets_that_a_student_sees(made: Path, stages: Stages) -> None:
    data, cache = f"arrays:{made / 'table.npz'}", softcache.Cache(made / "cache", f"arrays:{made / 'table.npz'}")
    labels = cache.labels("train").numpy()
    student = ("student", "--data", data, "--cache", made / "cache", "--arch", "mlp:4", "--epochs", 1)
    result = stages(*student, "--loss", "mse", "--out", "all")
    expected = measure_targets(labels)
    for key, values in zip(("output_mean", "output_std"), expected, strict=True):
        np.testing.assert_allclose(result["student"]["preparation"][key], values, rtol=1e-6)
    result = stages(*student, "--loss", "kd_mse", "--loss", "mse", "--labelled", 9, "--out", "few")
    seen = hide_labels(StudentConfig(labelled=9), labels)
    assert (~np.isnan(seen)).any(1).sum() == 9
    for key, values in zip(("output_mean", "output_std"), measure_targets(seen), strict=True):
        np.testing.assert_allclose(result["student"]["preparation"][key], values, rtol=1e-6)


def test_an_output_without_a_visible_target_is_standardised_by_the_teachers_numbers(made: Path) -> None:
    cache = softcache.Cache(made / "cache", f"arrays:{made / 'table.npz'}")
    labels = cache.labels("train").numpy().copy()
    labels[:, 1] = np.nan
    batch = next(iter(cache.loader("train", labels=labels)))
    assert batch.source is not None
    context = batch.source.make_context(parse_losses(("mse",)))
    assert context.mean is not None
    assert context.std is not None
    of_teacher = cache.targets("train", np.arange(len(labels))).double()
    np.testing.assert_allclose(context.std, [np.nanstd(labels[:, 0]), of_teacher[:, 1].std(correction=0)], rtol=1e-5)
    np.testing.assert_allclose(context.mean, [np.nanmean(labels[:, 0]), of_teacher[:, 1].mean()], rtol=1e-5)


@pytest.mark.parametrize("losses", [("kd_mse", "mse"), ("huber", "bounded")])
def test_units_do_not_change_what_is_learned(user_folder: Path, stages: Stages, losses: tuple[str, str]) -> None:
    (user_folder / "linear_teacher.py").write_text(
        "import numpy as np\nunits = np.load('units.npy')\n"
        "def predict(x):\n    return (np.tanh(x[:, :2] + x[:, 2:4]) + [3, -1]) * units\n"
    )
    results = {}
    for name, units in (("one", [1.0, 1.0]), ("apart", [2.0**-10, 2.0**10])):
        np.save("units.npy", units)
        data = save_table(user_folder / f"{name}.npz", np.array(units))
        sys.modules.pop("linear_teacher", None)
        stages("teacher-cache", "--data", data, "--teacher", "linear_teacher:predict", "--out", f"c-{name}")
        terms = [text for loss in losses for text in ("--loss", loss)]
        options = ("--data", data, "--cache", f"c-{name}", "--arch", "mlp:8", "--epochs", 4, *terms)
        results[name] = stages("student", *options, "--out", f"r-{name}")["student"]["test"]["per_output"]
    np.testing.assert_allclose(results["one"]["r2"], results["apart"]["r2"], rtol=1e-3)
    ratio = np.array(results["apart"]["rmse"]) / results["one"]["rmse"]
    np.testing.assert_allclose(ratio, [2.0**-10, 2.0**10], rtol=1e-3)


def test_a_network_with_one_number_may_return_one_axis(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).squeeze(1)  # type: ignore[no-any-return]

    random = np.random.default_rng(0)
    items = [(x, float(x.sum())) for x in random.normal(size=(24, 5)).astype(np.float32)]
    torch.manual_seed(0)
    cache = softcache.build_cache(tmp_path / "c", Flat(), items)
    assert cache.task == "numbers"
    assert cache.targets("train", [0, 1]).shape == (2, 1)
    outcome = softcache.train_student(cache, Flat(), losses=["kd_mse", "mse"], epochs=1, out=tmp_path / "r")
    assert outcome is not None
