"""What the random numbers of a view decide."""

import numpy as np
from numpy.typing import NDArray

Draw = int | NDArray[np.int64]  # one draw for all images of a batch, or int64 [B], one for each

# What a random number decides: a part of its key, so that a new parameter never shifts the numbers of an old one.
CROP_TOP, CROP_LEFT, FLIP, BOX_AREA, BOX_RATIO, BOX_TOP, BOX_LEFT, MIXUP_PARTNER, MIXUP_SHARE = range(9)
ATTEMPT_AREA, ATTEMPT_RATIO, ATTEMPT_TOP, ATTEMPT_LEFT = range(9, 13)  # the first two followed by the attempt
NOISE = 13  # followed by the number of four entries of a row
MIX_KIND, CUTMIX_SHARE, CUTMIX_TOP, CUTMIX_LEFT = range(14, 18)
ERASING, ERASING_TOP, ERASING_LEFT = range(18, 21)
ERASING_AREA, ERASING_RATIO = 21, 22  # followed by the attempt
JITTER_ORDER, JITTER_BRIGHTNESS, JITTER_CONTRAST, JITTER_SATURATION, JITTER_HUE, GRAY = range(23, 29)
RANDAUGMENT_OPERATION, RANDAUGMENT_SIGN = 29, 30  # followed by which of a view's operations it is
