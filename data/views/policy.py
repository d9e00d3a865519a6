"""View policies: how an image or a row of numbers becomes a view, as `--views` and the identity of a cache write
it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from softcache.base.errors import UsageError, unknown_name_error
from softcache.base.spec import check_parameters, parse_number, parse_spec

from .randaugment import parse_randaugment

_RANGES = {
    "min_scale": (0.001, 1.0),
    "global_scale": (0.001, 1.0),
    "revision": (1.0, 2.0),
    "std": (0.0, 1e9),
    "jitter": (0.0, 1.0),
    "hue": (0.0, 0.5),
    "gray": (0.0, 1.0),
    "erasing": (0.0, 1.0),
}


@dataclass(frozen=True)
class ViewPolicy:
    """How a view is made from an image.

    Attributes:
        name: Its name in VIEW_POLICIES.
        crop: Whether a window of the image's size is cut out of the padded image (He et al. 2016, section 4.2).
        flip: Whether a view is mirrored left to right, with probability 1/2.
        resized_crop: Whether a random box is cut out and resized (Szegedy et al. 2015), of ratio 3/4 to 4/3.
        noise: Whether normal noise is added to each number of a row; for rows of numbers alone.
        revision: How the boxes of resized crops are drawn: 2 as torchvision's RandomResizedCrop, 1 as in caches that
            were made before there was a revision, see `boxes.py`.
        pad: Pixels of zero padding on each side before a crop.
        std: Standard deviation of the noise, in the units of the data.
        min_scale: Least share of the image's area in a resized crop, 0.001 to 1; with several crops, in a local one.
        global_crops: Of several crops (Caron et al. 2020): how many draws in a row show most of the image; 0 is one
            kind of crop in all draws.
        local_crops: How many draws after these show a small part.
        global_scale: Least share of the area in a global crop, and largest one in a local crop.
        randaugment: Number of random operations on a view and their magnitude, such as "2x9" (Cubuk et al. 2020).
        jitter: Brightness, contrast and saturation are changed by random factors, from 1 - jitter to 1 + jitter each.
        hue: The hue is turned by a random part of the circle, from -hue to hue.
        gray: Probability of a view to be grey.
        erasing: Probability of a view to have a black rectangle (Zhong et al. 2020).
        mixup: Alpha of the Beta distribution of the shares of two mixed images (Zhang et al. 2018); 0 mixes none.
        cutmix: Alpha of the Beta distribution of the shares of two images, of which one fills a box in the other (Yun
            et al. 2019); 0 cuts none. With mixup too, a view is one or the other, each with probability 1/2.
        size: Side of the view in pixels; 0 is the images' own size.
        resize: Length in pixels to which the shorter side is scaled first; 0 is the images' own size.
        scale: Of a policy made by `at_size`: pixels of the view for one pixel of padding.
        drawn_size: Of a policy made by `at_size`: the size at which boxes inside of a view are drawn, that of the
            other policy; 0 is the view's own.
        interpolation: How an image is resized, a name of decoding.FILTERS: "bilinear" but for some teachers.
    """

    name: str
    crop: bool = False
    flip: bool = False
    resized_crop: bool = False
    noise: bool = False
    revision: int = 1
    pad: int = 0
    std: float = 0.0
    min_scale: float = 1.0
    global_crops: int = 0
    local_crops: int = 0
    global_scale: float = 1.0
    randaugment: str = ""
    jitter: float = 0.0
    hue: float = 0.0
    gray: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    size: int = 0
    resize: int = 0
    scale: int = 1
    drawn_size: int = 0
    interpolation: str = "bilinear"

    @property
    def mixes_images(self) -> bool:
        """Whether a view shows two images, and so has two hard targets."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def changes_colors(self) -> bool:
        """Whether the values of pixels are changed, not only their places."""
        return bool(self.randaugment) or self.jitter > 0 or self.hue > 0 or self.gray > 0

    @property
    def changes_pixels(self) -> bool:
        """Whether something is done to the pixels of a view that is cut out and flipped, see augmentation.py."""
        return self.changes_colors or self.erasing > 0

    def parameters(self) -> dict[str, float | str]:
        """Return the parameters that this policy has, with their values: part of a cache's identity.

        Revision 1 is left out, as in the identities of the caches that were made with it; so is an augmentation that
        is not used, as in those that were made before it existed.
        """
        values = {name: getattr(self, _FIELDS.get(name, name)) for name in _list_parameters(self)}
        if self.revision == 1:
            values.pop("revision", None)
        return {name: value for name, value in values.items() if value or name not in _AUGMENTATIONS}

    def without_augmentation(self) -> "ViewPolicy":
        """Return the policy of held-out splits: views of the same size, nothing random."""
        return replace(VIEW_POLICIES["none"], size=self.size, resize=self.resize, interpolation=self.interpolation)

    def of_split(self, split: str) -> "ViewPolicy":
        """Return the policy of a split: this one for "train", the one without augmentation for a held-out split."""
        return self if split == "train" else self.without_augmentation()

    def at_size(self, size: int, interpolation: str = "bilinear") -> "ViewPolicy":
        """Return the policy of the same views at another resolution: the same parts of the images, cut out of them.

        Args:
            size: Side of the view in pixels.
            interpolation: A name of decoding.FILTERS.

        Raises:
            UsageError: This policy pads images, and `size` is no multiple of its size: a border of whole pixels has
                no equal at that size.
        """
        scale = 1
        if self.crop and self.pad:
            if size % self.size:
                raise UsageError(
                    f"views '{self.name}' shift by whole pixels of {self.size} px, and {size} is no multiple of it:"
                    f" take a multiple, such as {self.size * max(1, round(size / self.size))}, or the views"
                    " resized-crop-flip"
                )
            scale = size // self.size
        resize, drawn_size = round(self.resize * size / self.size), self.size if size != self.size else 0
        return replace(self, size=size, resize=resize, scale=scale, drawn_size=drawn_size, interpolation=interpolation)


VIEW_POLICIES: dict[str, ViewPolicy] = {
    "none": ViewPolicy("none"),
    "crop": ViewPolicy("crop", crop=True, pad=4),
    "crop-flip": ViewPolicy("crop-flip", crop=True, flip=True, pad=4),
    "resized-crop-flip": ViewPolicy("resized-crop-flip", resized_crop=True, revision=2, flip=True, min_scale=0.08),
    "multi-crop": ViewPolicy(
        "multi-crop",
        resized_crop=True,
        revision=2,
        flip=True,
        min_scale=0.05,
        global_crops=2,
        local_crops=6,
        global_scale=0.4,
    ),
    "noise": ViewPolicy("noise", noise=True, std=0.1),
}
ROW_POLICIES = ("none", "noise")  # for rows of numbers
_FIELDS = {"global": "global_crops", "local": "local_crops"}  # of parameters whose names are others
# Of images alone, parameters of each policy for images.
_AUGMENTATIONS = ("randaugment", "jitter", "hue", "gray", "erasing", "cutmix")


def _list_parameters(policy: ViewPolicy) -> list[str]:
    names = ["mixup", "size", "resize"]
    if policy.noise:
        return ["std", *names]
    names += _AUGMENTATIONS
    if policy.crop:
        return ["pad", *names]
    if policy.name == "multi-crop":
        return [*_FIELDS, "min_scale", "global_scale", *names, "revision"]
    return ["min_scale", *names, "revision"] if policy.resized_crop else names


def parse_views(spec: str) -> ViewPolicy:
    """Parse a view policy with its parameters, such as `crop-flip:pad=4,mixup=0.2`.

    Raises:
        UsageError: No policy has this name, the policy has no such parameter, or a value is out of its range.
    """
    name, texts = parse_spec(spec, "views")
    if name not in VIEW_POLICIES:
        raise unknown_name_error("view policy", name, VIEW_POLICIES)
    policy = VIEW_POLICIES[name]
    check_parameters(spec, "views", texts, _list_parameters(policy))
    values: dict[str, float | str] = {}
    for parameter, text in texts.items():
        if parameter == "randaugment":
            values[parameter] = _normalize_randaugment(spec, text)
            continue
        value = parse_number(spec, "views", parameter, text)
        low, high = _RANGES.get(parameter, (0.0, 4096.0))
        if not low <= value <= high:
            raise UsageError(f"views '{spec}': {parameter}={text} is outside {low:g} to {high:g}")
        if parameter in ("pad", "size", "resize", "revision", *_FIELDS):
            if value != int(value):
                raise UsageError(f"views '{spec}': {parameter}={text} is not a whole number")
            value = int(value)
        values[_FIELDS.get(parameter, parameter)] = value
    policy = replace(policy, **values)  # type: ignore[arg-type]
    if name == "multi-crop":
        _check_crops(spec, policy)
    return policy


def _check_crops(spec: str, policy: ViewPolicy) -> None:
    if policy.revision != 2:
        raise UsageError(f"views '{spec}': revision={policy.revision} is of resized-crop-flip alone: leave it out")
    if not policy.global_crops + policy.local_crops:
        raise UsageError(f"views '{spec}': global=0 and local=0: no crop is left, one of both is at least 1")
    if policy.min_scale > policy.global_scale:
        scales = f"min_scale={policy.min_scale:g} is above global_scale={policy.global_scale:g}"
        raise UsageError(f"views '{spec}': {scales}: local crops are between")


def _normalize_randaugment(spec: str, text: str) -> str:
    try:
        return "x".join(map(str, parse_randaugment(text)))
    except UsageError as error:
        raise UsageError(f"views '{spec}': {error}") from None


def check_policy(policy: ViewPolicy, shape: tuple[int, ...]) -> None:
    """Check that a view policy is one for the data.

    Args:
        policy: The policy.
        shape: Of a row of numbers; () for images.

    Raises:
        UsageError: It crops rows of numbers, or adds noise to images.
    """
    if policy.noise and not shape:
        raise UsageError(
            f"views '{policy.name}' are for rows of numbers, the data are images: there are"
            f" {', '.join(name for name in VIEW_POLICIES if name != policy.name)}"
        )
    if shape and policy.name not in ROW_POLICIES:
        raise UsageError(
            f"views '{policy.name}' are for images, the data are rows of numbers {list(shape)}: there are"
            f" {', '.join(ROW_POLICIES)}, such as noise:std=0.1 or none:mixup=0.2"
        )
    for name in ("size", "resize", *_AUGMENTATIONS):
        if shape and (value := policy.parameters().get(name)):
            raise UsageError(
                f"views: {name}={value} is for images, the data are rows of numbers {list(shape)}: leave it out"
            )


def read_views(record: Mapping[str, Any]) -> ViewPolicy:
    """Return the policy that the identity of a cache records.

    Args:
        record: Its "views": the policy's name, its parameters, and the seed of the views, not yet checked.

    Raises:
        KeyError: There is no name.
        UsageError: As in `parse_views`.
    """
    policy = str(record["policy"])
    parameters = {name: value for name, value in record.items() if name not in ("policy", "seed")}
    if policy == "resized-crop-flip":
        parameters.setdefault("revision", 1)
    return parse_views(f"{policy}:" + ",".join(f"{name}={value}" for name, value in parameters.items()))
