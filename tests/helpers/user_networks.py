"""Networks as users write them: the factories are named in tests as `tests.helpers.user_networks:NAME`."""

import functools
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

OutputOf = Callable[[torch.Tensor, torch.Tensor], Any]


def base(classes: int, channels: int) -> nn.Sequential:
    """A small network for images of any size."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes)
    )


# Factories


class Wrapped(nn.Module):
    """A network around another one."""

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.net = base(classes, channels)


class DropsAlways(Wrapped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.net(x), 0.5, training=True)


class EndsInSoftmax(Wrapped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.net(x), 1)


class Prints(Wrapped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("hello from forward")
        return self.net(x)  # type: ignore[no-any-return]


class AtMostEightRows(Wrapped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x[:8])  # type: ignore[no-any-return]


def plain(*, classes: int, channels: int, size: int) -> nn.Module:
    return base(classes, channels)


def positional(classes: int, channels: int, size: int) -> nn.Module:
    return base(classes, channels)


def reordered(size: int, channels: int, classes: int) -> nn.Module:
    return base(classes, channels)


def positional_only(classes: int, channels: int, /) -> nn.Module:
    return base(classes, channels)


def classes_alone(classes: int) -> nn.Module:
    return base(classes, 1)


def no_arguments() -> nn.Module:
    return base(10, 1)


def keywords(**sizes: int) -> nn.Module:
    return base(sizes["classes"], sizes["channels"])


def rest(*args: int, **sizes: int) -> nn.Module:
    return base(sizes["classes"], sizes["channels"])


def with_defaults(classes: int = 2, channels: int = 1, width: int = 4) -> nn.Module:
    return base(classes, channels)


class Net(nn.Module):
    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.net = base(classes, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(x)
        return logits


ready = base(10, 1)
partial = functools.partial(Net, channels=1)
shorthand = lambda classes, channels: base(classes, channels)  # noqa: E731


def scripted(classes: int, channels: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(base(classes, channels))


def parallel(classes: int, channels: int) -> nn.Module:
    return nn.DataParallel(base(classes, channels))


def prints_and_sets(classes: int, channels: int) -> nn.Module:
    print("a line of my own")
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    return base(classes, channels)


@functools.cache
def cached(classes: int, channels: int) -> nn.Module:
    return base(classes, channels)


def module_global() -> nn.Module:
    return ready


class Zoo:
    @staticmethod
    def small(classes: int, channels: int) -> nn.Module:
        return base(classes, channels)


# Factories that cannot be used


def other_names(num_classes: int, in_chans: int) -> nn.Module:
    return base(num_classes, in_chans)


def raises(**sizes: int) -> nn.Module:
    raise RuntimeError("weights of the hub\ncannot be fetched")


def exits(**sizes: int) -> nn.Module:
    raise SystemExit("usage: train.py")


def deep_error(classes: int) -> nn.Module:
    return nn.Linear(classes, -1)


def returns_none(classes: int) -> None:
    base(classes, 1)


def returns_a_pair(classes: int) -> tuple[nn.Module, str]:
    return base(classes, 1), "transform"


def returns_a_class() -> type[nn.Module]:
    return Net


not_a_factory = {"classes": 10}


class Unfinished(nn.Module):
    def __init__(self, classes: int):
        self.linear = nn.Linear(8, classes)  # super().__init__() was forgotten


def on_meta(classes: int) -> nn.Module:
    with torch.device("meta"):
        return base(classes, 1)


# Weights


def lazy(*, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(classes))


class UnusedLazy(Net):
    def __init__(self, classes: int, channels: int):
        super().__init__(classes, channels)
        self.unused = nn.LazyLinear(3)


def half(classes: int, channels: int) -> nn.Module:
    return base(classes, channels).half()


def bfloat16(classes: int, channels: int) -> nn.Module:
    return base(classes, channels).bfloat16()


def double(classes: int, channels: int) -> nn.Module:
    return base(classes, channels).double()


class NoParameters(nn.Module):
    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, : self.classes]


def frozen(classes: int, channels: int) -> nn.Module:
    return base(classes, channels).requires_grad_(False)


# Outputs

Pair = namedtuple("Pair", "logits aux")


class Unnamed(NamedTuple):
    scores: torch.Tensor
    aux: torch.Tensor


@dataclass
class Result:
    logits: torch.Tensor
    hidden: torch.Tensor


@dataclass
class Scores:
    scores: torch.Tensor


class Slotted:
    __slots__ = ("logits",)

    def __init__(self, logits: torch.Tensor):
        self.logits = logits


class Property:
    def __init__(self, z: torch.Tensor):
        self._z = z

    @property
    def logits(self) -> torch.Tensor:
        return self._z


class Wrapped(nn.Module):
    """A network whose output is made by `evaluate`, in training mode by `train_output`, of logits and features."""

    def __init__(self, classes: int, channels: int, evaluate: OutputOf, train_output: OutputOf):
        super().__init__()
        self.net, self.evaluate, self.train_output = base(classes, channels), evaluate, train_output

    def forward(self, x: torch.Tensor) -> Any:
        features = self.net[:-1](x)
        return (self.train_output if self.training else self.evaluate)(self.net[-1](features), features)


def returning(evaluate: OutputOf, train_output: OutputOf | None = None) -> Callable[..., nn.Module]:
    def make(classes: int, channels: int) -> nn.Module:
        return Wrapped(classes, channels, evaluate, train_output or evaluate)

    return make


one_tuple = returning(lambda z, f: (z,))
one_list = returning(lambda z, f: [z])
with_features = returning(lambda z, f: (f, z))
with_none = returning(lambda z, f: (z, None))
named_tuple = returning(lambda z, f: Pair(z, z / 2))
dictionary = returning(lambda z, f: {"features": f, "logits": z})
ordered = returning(lambda z, f: OrderedDict(out=z, aux=z / 2))
dataclass_result = returning(lambda z, f: Result(z, f))
slotted = returning(lambda z, f: Slotted(z))
property_result = returning(lambda z, f: Property(z))

two_logits = returning(lambda z, f: (z, z / 2))
two_keys = returning(lambda z, f: {"cls": z, "dist": z / 2})
unnamed_tuple = returning(lambda z, f: Unnamed(z, z / 2))
scores = returning(lambda z, f: Scores(z))
nested = returning(lambda z, f: ((z, z), f))
nothing = returning(lambda z, f: None)
text = returning(lambda z, f: "logits")
numpy_array = returning(lambda z, f: z.detach().numpy())
not_logits = returning(lambda z, f: {"logits": "z"})

spatial = returning(lambda z, f: z[:, :, None, None])
one_dimension = returning(lambda z, f: z[:, 0])
too_wide = returning(lambda z, f: f)
predicted = returning(lambda z, f: (z > 0).long())
squeezed = returning(lambda z, f: z.squeeze(0))

aux_in_training = returning(lambda z, f: z, lambda z, f: (z, z * 0.5))
named_in_training = returning(lambda z, f: z, lambda z, f: Pair(z, z * 0.5))
dict_in_training = returning(lambda z, f: z, lambda z, f: {"logits": z, "loss": z.sum()})
aux_first = returning(lambda z, f: z, lambda z, f: [z * 0.5, z])
dist_in_training = returning(lambda z, f: z, lambda z, f: (f, z))
unclear_in_training = returning(lambda z, f: z, lambda z, f: {"main": z, "aux": z})
detached = returning(lambda z, f: z, lambda z, f: z.detach())


# Forward and backward passes


class Fixed(nn.Module):
    """A network for images of 32 pixels."""

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(channels, 4, 3, padding=1), nn.Linear(4 * 32 * 32, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(self.conv(x).flatten(1))
        return logits


def three_channels(classes: int) -> nn.Module:
    return base(classes, 3)


class Views(Net):
    """`view` needs a contiguous tensor, which a channels-last feature map is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.net[2](self.net[1](self.net[0](x)))
        logits: torch.Tensor = self.net[4](x.view(len(x), -1))
        return logits


class FailsInTraining(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise KeyError("targets")
        return super().forward(x)


class FailsInEval(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            raise NotImplementedError
        return super().forward(x)


class FailsBackwards(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x).sigmoid()
        return x.add_(1)


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("a mistake in my own gradient")


class OwnGradient(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = _BadGradient.apply(super().forward(x))
        return logits


def rows_normalised(*, classes: int, channels: int, size: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(channels * size * size, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes)
    )


class FailsLater(Net):
    """Fails in the fifth batch of a training."""

    steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
            if self.steps > 4:
                raise ValueError("a mistake in my own network")
        return super().forward(x)
