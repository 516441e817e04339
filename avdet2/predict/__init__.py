# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What a run learned, at work: objects in pictures and videos, by their names.
"""

from avdet2.predict.predictor import Frame, Predictor

__all__ = ["Frame", "Predictor"]
