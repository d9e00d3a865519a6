"""Options that several commands share, in groups; a group is a base class of the commands' config classes."""

from dataclasses import dataclass, field
from typing import Any, ClassVar


def option(default: Any, text: str, **more: Any) -> Any:
    """Declare an option.

    Args:
        default: its value where it is not given.
        text: its help.
        more: `least` and `most` of a number; `choices` of a text; `switch` for a flag that has a `--no-` form;
            `by_recipe` where the data set's defaults fill it in.
    """
    return field(default=default, metadata={"help": text, **more})


# The order of the headings in --help.
HEADINGS = (
    "Plan",
    "Search",
    "Chain",
    "Methods",
    "Inspection",
    "Report",
    "Export",
    "Check",
    "Teachers",
    "Teacher",
    "Student and loss",
    "Cache",
    "Data",
    "Run",
    "Training",
    "Several students",
    "Machine",
    "Output",
    "Other",
)

ARCH_HELP = (
    "Network: mlp:W,W  cnn  resnet8…110  resnet8x4  resnet32x4  wrn_16_1  wrn_16_2  wrn_40_1  wrn_40_2  vgg8  vgg13  "
    "mobilenet_v2  shufflenet_v1  shufflenet_v2  torchvision:NAME  timm:NAME  hf:NAME  "
    "my_package.module:factory, called as factory(classes=…, channels=…, size=…, shape=…)."
)
FILE_TEACHER_HELP = (
    "Or a file: onnx:FILE, run by ONNX Runtime; logits:FILE.npz or .parquet, targets that were made elsewhere."
)
CUSTOM_ARCH_HELP = "The student's arch, where it is code of yours: my_package.module:factory."
WEIGHTS_KEY_HELP = (
    "Which weights of a file that holds several, such as model_ema; dots lead into nested ones: state_dict.ema."
)
OUTPUT_HELP = "Key or index of the logits in what a network of your own returns, where that is not clear: logits or 0."
VIEWS_HELP = (
    "Augmentation: none, crop, crop-flip, resized-crop-flip or multi-crop, with parameters: crop:pad=4; each also "
    "with randaugment=2x9, jitter=0.4, hue=0.1, gray=0.2, erasing=0.25, mixup=1, cutmix=1; of rows of numbers: none "
    "or noise:std=0.1, also with mixup=1."
)
COMBINE_HELP = "mean_logit, geometric, weighted:0.7,0.3, vote, learned, per_teacher, ca_mkd"
CACHE_HELP = "Folder of the cache, where it is no longer where the run recorded it; repeat for several."
SELECT = ("last", "accuracy", "f1_macro", "nll", "map", "rmse", "mae", "r2", "cosine")
PRECISIONS = ("float32", "bfloat16", "auto")
NORMALIZE_HELP = (
    "imagenet, data, none (0 to 1), pixels (0 to 255), model (as published with a torchvision:, timm: or hf: network),"
    " or numbers for values of 0 to 1: mean=0.5,0.5,0.5,std=0.25,0.25,0.25."
)
INIT_HELP = (
    "Weights that the training starts from: DEFAULT for those published with a torchvision:, timm: or hf: network, a"
    " file of them, or the folder of a run; the last layer is fresh where the classes differ."
)
INDEX_HELP = (
    "Folder that records what data files hold, so that unchanged ones are not read again; none: no records;"
    " softcache in the user's cache folder when not given."
)
REHASH_HELP = "Read all data files again, whatever the index records, and record them anew."
OUTPUTS = ("logits", "probabilities")


@dataclass(frozen=True)
class DataOptions:
    """Which transfer set, and where it is stored."""

    heading: ClassVar[str] = "Data"
    data: str = option(
        "",
        "digits, mnist, fashion-mnist, cifar10, cifar100, folder:PATH, arrays:FILE.npz (or a folder of .npy),"
        " parquet:GLOB, webdataset:GLOB, hf:NAME or my_module:factory; the cache's, or digits, when not given.",
    )
    data_root: str = option("datasets", "Folder of the data sets that torchvision reads.")
    index: str = option("", INDEX_HELP)
    rehash: bool = option(False, REHASH_HELP)


@dataclass(frozen=True)
class FolderOptions:
    """How a folder of images is read."""

    heading: ClassVar[str] = "Data"
    classes: str = option(
        "",
        "Order of the classes: natural, number, or a file with one name a line; by their text when not given.",
    )
    exif: str = option(
        "stored",
        "Pixels of a folder's images as stored, or turned by their EXIF orientation.",
        choices=("stored", "transpose"),
    )
    unreadable: str = option(
        "error",
        "Images of a folder that cannot be decoded; skip leaves them out, and decodes every image once to find them.",
        choices=("error", "skip"),
    )
    layout: str = option(
        "any",
        "How splits and labels of a folder are found. basic: folders train, val and test with class folders, all else"
        " is left out; unlabelled: no labels are read.",
        choices=("any", "basic", "unlabelled"),
    )
    task: str = option(
        "",
        "What is predicted: classes, one of each image; labels, several of each image; numbers; embedding, a teacher's"
        " output without classes. As the data have it when not given.",
        choices=("classes", "labels", "numbers", "embedding"),
    )
    columns: str = option(
        "", "Columns of parquet:GLOB and hf:NAME, where they are not found: image=img,label=fine_label."
    )


@dataclass(frozen=True)
class SplitOptions:
    """How a transfer set is split, and which of its training rows are used."""

    heading: ClassVar[str] = "Data"
    val_fraction: float = option(
        0.0, "Share of the training data used for validation.", least=1e-6, most=0.9, by_recipe=True
    )
    test_fraction: float = option(
        0.0, "Share of the training data that becomes the test split, where the data have none.", least=0, most=0.9
    )
    train_size: int = option(0, "Use this many training rows, drawn by class; 0: all.", least=0)
    imbalance: str = option(
        "", "Use a long tail of the training rows: 100 or 100:step, the ratio of the largest to the smallest class."
    )
    head_size: int = option(0, "Rows of the largest class with --imbalance; 0: as many as the data allow.", least=0)


@dataclass(frozen=True)
class MachineOptions:
    """Where the work is done."""

    heading: ClassVar[str] = "Machine"
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    workers: int = option(
        0, "Processes that decode the images of a folder; 0: a thread of this process.", least=0, most=256
    )


@dataclass(frozen=True)
class PrecisionOptions:
    """Numeric precision of the networks."""

    heading: ClassVar[str] = "Machine"
    precision: str = option("float32", "Numeric precision of the networks.", choices=("float32", "bfloat16"))


@dataclass(frozen=True)
class OutputOptions:
    """What is printed."""

    heading: ClassVar[str] = "Output"
    json: bool = option(
        False, "Print the result as one JSON object on standard output; messages go to standard error."
    )


@dataclass(frozen=True)
class OptimizationOptions:
    """How a network is trained."""

    heading: ClassVar[str] = "Training"
    epochs: int = option(0, "Passes over the training rows.", least=1, by_recipe=True)
    batch_size: int = option(0, "Rows of a batch.", least=1, by_recipe=True)
    optimizer: str = option("sgd", "SGD with momentum, or AdamW.", choices=("sgd", "adamw"))
    learning_rate: float = option(0.0, "The highest learning rate of the schedule.", least=1e-12, by_recipe=True)
    momentum: float = option(0.9, "Momentum of SGD.", least=0, most=0.9999)
    nesterov: bool = option(True, "Nesterov momentum.", switch=True)
    weight_decay: float = option(-1.0, "Weight decay, on all weights.", least=0, by_recipe=True)
    schedule: str = option(
        "cosine",
        "Learning rate schedule; step: a tenth at each of --milestones.",
        choices=("cosine", "step", "constant"),
    )
    milestones: str = option("0.5,0.75", "Shares of the training at which the schedule `step` goes down.")
    warmup: float = option(0.02, "Share of the steps in which the learning rate rises linearly.", least=0, most=0.9)
    clip_norm: float = option(0.0, "Clip the norm of the gradient to this; 0: off.", least=0)
    ema: float = option(
        0.0,
        "Decay of a moving average of the weights, which then is the result; 0: off.",
        least=0,
        most=0.99999,
    )
    select: str = option(
        "last", "Keep the weights of the last epoch, or of the best by this figure of validation.", choices=SELECT
    )
    compile: bool = option(False, "Compile the network with torch.compile: takes seconds once, then steps are faster.")
    sampler: str = option(
        "", "Draw each class equally often, or by the square root of its rows.", choices=("balanced", "sqrt")
    )
    seed: int = option(0, "Seed of the initial weights and of the order of rows.", least=0, most=2**31)


@dataclass(frozen=True)
class RunOptions:
    """What is kept of a training, and where."""

    heading: ClassVar[str] = "Run"
    keep_every: int = option(
        0, "Keep the weights after every so many epochs as well, for example as teachers stopped early.", least=0
    )
    log_every: int = option(
        0,
        "Where standard error is no terminal: print a line after every so many epochs; 0: after at most 40 epochs of a"
        " training, none within 10 s of another.",
        least=0,
    )
    tensorboard: bool = option(False, "Write TensorBoard event files as well, in the folder of each training.")
    out: str = option("", "Folder of the run; a new one under runs/ when not given.")
    resume: bool = option(False, "Continue the run in --out, with the options it was started with.")


@dataclass(frozen=True)
class TrainingOptions(OptimizationOptions, RunOptions):
    """What a teacher and a student have in common."""


@dataclass(frozen=True)
class CacheSourceOptions:
    """Which caches a student is trained from, and what of them."""

    heading: ClassVar[str] = "Cache"
    cache: tuple[str, ...] = option(
        (),
        "Folder of the cache; repeat for several teachers; caches/DATA, or caches/digits, when not given.",
    )
    combine: str = option("", f"How several teachers are combined: {COMBINE_HELP}; mean_probability when not given.")
    map: str = option("", "Map of the teacher's distribution: temperature, vector, matrix, prior or prior:tau=0.5.")
    missing: str = option(
        "",
        "Rows whose targets are missing: skip them, or learn them from their labels (hard); an error when not given.",
        choices=("skip", "hard"),
    )
    draws: int = option(0, "Use this many draws of the cache, from the first on; 0: all.", least=0)
    draws_per_decode: int = option(
        1, "Views of an image in a batch, each of another draw, from one decoding.", least=1
    )
