"""Default settings for each data source: archs, views, losses and training settings where an option is left out."""

from dataclasses import dataclass

from softcache.data.sources import DATASET, parse_data


@dataclass(frozen=True)
class Defaults:
    """The settings of the commands for one data source.

    Archs, views and losses are written as on the command line.

    Attributes:
        views: View policy of a cache, and so of its students.
        draws: Draws of a cache.
        teacher: Arch of a teacher.
        teacher_views: View policy of a teacher's training.
        teacher_epochs: Epochs of a teacher.
        student: Arch of a student.
        student_epochs: Epochs of a student.
        losses: Terms of a student's loss.
        batch_size: Rows of a training step, of teachers and students.
        learning_rate: Highest learning rate of a student.
        weight_decay: Weight decay of a student.
        teacher_learning_rate: Highest learning rate of a teacher.
        teacher_weight_decay: Weight decay of a teacher.
        val_fraction: Share of the training data for validation.
    """

    views: str = "crop-flip"
    draws: int = 10
    teacher: str = "resnet56"
    teacher_views: str = "crop-flip"
    teacher_epochs: int = 100
    student: str = "resnet8"
    student_epochs: int = 100
    losses: tuple[str, ...] = ("kd:temperature=4,weight=0.9", "hard:weight=0.1")
    batch_size: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 1e-4
    teacher_learning_rate: float = 0.1
    teacher_weight_decay: float = 5e-4
    val_fraction: float = 0.1


_IMAGES = Defaults(  # a user's own images, of any size
    views="resized-crop-flip",
    teacher_views="resized-crop-flip",
    teacher="torchvision:resnet50",
    student="torchvision:mobilenet_v3_small",
    learning_rate=0.02,  # with 0.1, small networks without batch norm diverge or end at chance
)

# The reasons for these numbers: docs/guides/recipes.md, "The defaults for digits".
DEFAULTS: dict[str, Defaults] = {
    "digits": Defaults(
        views="none",
        draws=1,
        teacher="cnn",
        teacher_views="crop:pad=1",
        teacher_epochs=60,
        teacher_learning_rate=0.05,
        teacher_weight_decay=1e-3,
        student="mlp:64",
        student_epochs=150,
        losses=("kd:temperature=4",),
        batch_size=64,
        val_fraction=0.125,
    ),
    "mnist": Defaults(
        views="none",
        draws=1,
        teacher="mlp:1200,1200",
        teacher_views="crop:pad=2",
        teacher_epochs=30,
        teacher_learning_rate=0.05,
        teacher_weight_decay=1e-4,
        student="mlp:800,800",
        student_epochs=20,
        losses=("kd:temperature=20",),
        learning_rate=0.05,
    ),
    "fashion-mnist": Defaults(teacher="resnet20", teacher_epochs=30, student="cnn", student_epochs=30),
    "cifar10": Defaults(),
    "cifar100": Defaults(),
    "folder": _IMAGES,
    "hf": _IMAGES,
    "parquet": _IMAGES,
    "webdataset": _IMAGES,
    "arrays": Defaults(
        views="none",
        draws=1,
        teacher="mlp:512,512",
        teacher_views="none",
        teacher_epochs=60,
        teacher_learning_rate=0.05,
        student="mlp:64",
        learning_rate=0.05,
    ),
    DATASET: Defaults(learning_rate=0.02),  # as _IMAGES
}


ROW_DEFAULTS = DEFAULTS["arrays"]  # of rows of numbers, also of a dataset


def find_defaults(data: str) -> Defaults:
    """Return the defaults for the data that `digits` or `folder:PATH` names, or for a dataset of a user's own.

    Raises:
        UsageError: There is no such data source.
    """
    return DEFAULTS[data if data == DATASET else parse_data(data)[0]]
