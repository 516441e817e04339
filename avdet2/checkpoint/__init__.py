# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
from avdet2.checkpoint.convert import ResNetWeights, read_resnet  # noqa: F401
from avdet2.checkpoint.pixel_settings import pixel_messages  # noqa: F401
from avdet2.checkpoint.rescale import rescale  # noqa: F401
from avdet2.checkpoint.sources import SOURCES  # noqa: F401
from avdet2.checkpoint.writing import describe, save_resnet  # noqa: F401
