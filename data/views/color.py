"""Colours of views: what torchvision's functions of the same names do to uint8 tensors, by NumPy and without torch.

Everything is computed in integers, or by single additions, products and quotients of float32, each of which IEEE 754
rounds correctly: the same pixels on every machine. In all functions, pixels are uint8 [B, C, H, W] with one channel or
three, factors float64 [B], and the result is a new array. A pixel may be one level apart from torchvision's where the
exact result is a whole number, or nearly, because torch may fuse two operations.

Source: torchvision.transforms.v2.functional; Cubuk et al. 2020, "RandAugment", for their use.
"""

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Factors = NDArray[np.float64]


def convert_to_gray(pixels: Pixels) -> Pixels:
    """The luma of RGB images, rounded down, uint8 [B, 1, H, W]; images of one channel as they are."""
    if pixels.shape[1] == 1:
        return pixels.copy()
    red, green, blue = (pixels[:, c : c + 1].astype(np.uint32) for c in range(3))
    return ((2989 * red + 5870 * green + 1140 * blue) // 10_000).astype(np.uint8)


def adjust_brightness(pixels: Pixels, factors: Factors) -> Pixels:
    """pixels * factor."""
    return _clip(pixels * _to_float32(factors))


def adjust_contrast(pixels: Pixels, factors: Factors) -> Pixels:
    """A blend with the mean luma of the image."""
    sums = convert_to_gray(pixels).sum((1, 2, 3), dtype=np.int64)
    return _blend(pixels, _to_float32(sums / (pixels.shape[2] * pixels.shape[3])), factors)


def adjust_saturation(pixels: Pixels, factors: Factors) -> Pixels:
    """A blend with the luma of each pixel."""
    if pixels.shape[1] == 1:
        return pixels.copy()
    return _blend(pixels, convert_to_gray(pixels).astype(np.float32), factors)


def adjust_sharpness(pixels: Pixels, factors: Factors) -> Pixels:
    """A blend of the pixels inside of the border with their weighted mean: 5 for a pixel, 1 for each neighbour."""
    if min(pixels.shape[2:]) <= 2:
        return pixels.copy()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1].astype(np.uint16) + pixels[:, :, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inside = pixels[:, :, 1:-1, 1:-1]
    sums += 4 * inside.astype(np.uint16)
    smooth = (sums + np.uint16(6)) // np.uint16(13)  # to the nearest: there are no ties, 13 is odd
    sharpened = pixels.copy()
    sharpened[:, :, 1:-1, 1:-1] = _blend(inside, smooth.astype(np.float32), factors)
    return sharpened


def posterize(pixels: Pixels, bits: int) -> Pixels:
    """Keep the highest bits of each pixel, 0 to 8."""
    return pixels & np.uint8(256 - (1 << (8 - bits)))


def solarize(pixels: Pixels, threshold: int) -> Pixels:
    """Invert the pixels from a threshold on, 0 to 256."""
    return np.where(pixels >= threshold, ~pixels, pixels)


def stretch_contrast(pixels: Pixels) -> Pixels:
    """torchvision's autocontrast: the darkest pixel of each channel becomes 0, the brightest 255."""
    darkest, brightest = (f(pixels, axis=(2, 3), keepdims=True).astype(np.float32) for f in (np.min, np.max))
    scale = (brightest - darkest) * np.float32(1 / 255)
    is_flat = darkest == brightest
    darkest[is_flat], scale[is_flat] = 0, 1
    return _clip((pixels - darkest) / scale)


def equalize(pixels: Pixels) -> Pixels:
    """Map each channel so that its levels are used equally often, by the integer formula of Pillow and torchvision."""
    B, C, H, W = pixels.shape
    cells = pixels.reshape(B * C, H * W) + 256 * np.arange(B * C)[:, None]
    histograms = np.bincount(cells.ravel(), minlength=256 * B * C).reshape(B * C, 256)
    sums = histograms.cumsum(1)
    brightest = histograms[np.arange(B * C), sums.argmax(1)]
    steps = ((H * W - brightest) // 255)[:, None]
    tables = np.zeros((B * C, 256), np.uint8)
    tables[:, 1:] = np.minimum((sums[:, :-1] + steps // 2) // np.maximum(steps, 1), 255)
    tables[steps[:, 0] == 0] = np.arange(256)
    equalized: Pixels = tables.ravel()[cells].reshape(pixels.shape)
    return equalized


def adjust_hue(pixels: Pixels, factors: Factors) -> Pixels:
    """Turn the hue by a part of the circle, -0.5 to 0.5.

    Hue is a number h of 0 to 6 in units of 2**-16; with the largest channel v and the range c of a pixel, the new
    channel is v - c * max(0, min(k, 4 - k, 1)), k = h + 5, 3 or 1 (red, green or blue) modulo 6. As in torchvision, a
    channel of exact value x becomes the floor of x * 255.999 / 255.
    """
    if pixels.shape[1] == 1:
        return pixels.copy()
    red, green, blue = (pixels[:, c].astype(np.int32) for c in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    span = value - np.minimum(np.minimum(red, green), blue)
    is_red = (value == red).astype(np.int32)  # sums of products: np.where takes 10 us for 1,024 pixels, these 3 us
    is_green = (value == green) * (1 - is_red)
    place = is_red * (green - blue) + is_green * (2 * span + blue - red)  # of the hue, times the range
    place += (1 - is_red - is_green) * (4 * span + red - green)
    turns = np.floor(factors * (6 << 16) + 0.5).astype(np.int32) % (6 << 16)
    unit = span << 16
    circle = 6 * unit
    place = _wrap((place << 16) + circle, circle)
    place = _wrap(place + turns[:, None, None] * span, circle)
    value <<= 16
    turned = np.empty_like(pixels)
    for channel, offset in enumerate((5, 3, 1)):
        k = _wrap(place + offset * unit, circle)
        part = 4 * unit - k
        np.minimum(part, k, out=part)
        np.minimum(part, unit, out=part)
        np.maximum(part, 0, out=part)
        exact = np.subtract(value, part, out=part)
        turned[:, channel] = (exact + (exact >> 8)) >> 16
    return turned


def _wrap(numbers: NDArray[np.int32], circle: NDArray[np.int32]) -> NDArray[np.int32]:
    """Numbers from 0 to below twice the circle, modulo the circle: negative ones are large without a sign."""
    return np.minimum(numbers.view(np.uint32), (numbers - circle).view(np.uint32)).view(np.int32)


def _blend(pixels: Pixels, others: NDArray[np.float32], factors: Factors) -> Pixels:
    """pixels + (others - pixels) * (1 - factor), rounded down, from 0 to 255: where both are equal, they stay."""
    blended = others - pixels
    blended *= _to_float32(1 - factors)
    blended += pixels
    return _clip(blended)


def _to_float32(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    return numbers.astype(np.float32)[:, None, None, None]


def _clip(numbers: NDArray[np.float32]) -> Pixels:
    return np.clip(numbers, 0, 255, out=numbers).astype(np.uint8)
