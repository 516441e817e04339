# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
from avdet2.engine.stages.base import FINAL, StageKind  # noqa: F401
from avdet2.engine.stages.registry import STAGE_KINDS, stage_kind  # noqa: F401
