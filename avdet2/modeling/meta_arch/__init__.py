# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
from avdet2.modeling.meta_arch.av_localizer import AVLocalizer  # noqa: F401
from avdet2.modeling.meta_arch.simclr import SimCLR  # noqa: F401
