# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Data sets that exist by name as soon as avdet2 is imported.
"""

import os

from avdet2.data.datasets.audioset import register_audioset
from avdet2.data.datasets.audioset_boxes import register_audioset_boxes
from avdet2.data.datasets.flickr import register_flickr
from avdet2.data.datasets.music import register_music
from avdet2.data.datasets.music_clips import register_music_clips
from avdet2.data.datasets.openimages import register_openimages
from avdet2.data.datasets.synthetic import register_synthetic
from avdet2.data.datasets.vggsound import register_vggsound
from avdet2.data.datasets.vggss import register_vggss

# The root is Detectron2's; nothing is read before a data set is used.
_root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
register_synthetic(os.path.join(_root, "synthetic_av"))
register_vggsound(os.path.join(_root, "vggsound"))
register_audioset(os.path.join(_root, "audioset"))
register_openimages(os.path.join(_root, "openimages"))
register_vggss(os.path.join(_root, "vggss"))
register_flickr(os.path.join(_root, "flickr_soundnet"))
register_music(os.path.join(_root, "music"))
register_music_clips(os.path.join(_root, "music"))
register_audioset_boxes(os.path.join(_root, "audioset_boxes"))
