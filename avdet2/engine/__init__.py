# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
from avdet2.config_file import load_cfg  # noqa: F401
from avdet2.engine.defaults import resolve_epochs, setup, use_own_data  # noqa: F401
from avdet2.engine.hooks import SelfLabelHook  # noqa: F401
from avdet2.engine.trainer import AVTrainer  # noqa: F401
