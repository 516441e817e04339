# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Objects followed through a video, by ByteTrack of the package `trackers`.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from avdet2.predict.predictor import Frame

__all__ = ["track"]


def track(frames: Iterable[Frame], fps: float, score: float) -> Iterator[Frame]:
    """
    Give objects that are the same in several frames one number: the field `track_ids`, -1 where
    there is none (yet).

    Args:
        frames: of one video, in order.
        fps: about how many frames a second there are.
        score: what scores less begins no track.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        import supervision
        from trackers import ByteTrackTracker
    except ImportError as error:
        raise ValueError(
            f"tracking needs a package that is not here ({error}): pip install trackers"
        ) from error
    tracker = ByteTrackTracker(
        frame_rate=fps or 25.0, track_activation_threshold=score, high_conf_det_threshold=score
    )
    for frame in frames:
        instances = frame.instances
        found = supervision.Detections(
            xyxy=instances.pred_boxes.tensor.numpy().reshape(-1, 4),
            confidence=instances.scores.numpy(),
            class_id=instances.pred_classes.numpy(),
            # They may come back in another order.
            data={"place": np.arange(len(instances))},
        )
        tracked = tracker.update(found)
        ids = torch.full((len(instances),), -1)
        if len(tracked):
            ids[torch.as_tensor(tracked.data["place"])] = torch.as_tensor(tracked.tracker_id)
        instances.track_ids = ids
        yield frame
