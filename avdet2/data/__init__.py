# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
from avdet2.data import datasets  # noqa: F401
from avdet2.data.av_mapper import AVMapper  # noqa: F401
from avdet2.data.clips import register_av_clips  # noqa: F401
from avdet2.data.frame_mapper import FrameMapper  # noqa: F401
from avdet2.data.self_box_mapper import SelfBoxMapper  # noqa: F401
