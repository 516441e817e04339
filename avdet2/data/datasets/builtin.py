# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Data sets that exist by name as soon as avdet2 is imported.
"""

from avdet2.data.datasets.audioset import register_audioset
from avdet2.data.datasets.audioset_boxes import register_audioset_boxes
from avdet2.data.datasets.flickr import register_flickr
from avdet2.data.datasets.music import register_music
from avdet2.data.datasets.music_clips import register_music_clips
from avdet2.data.datasets.openimages import register_openimages
from avdet2.data.datasets.prepare import default_root
from avdet2.data.datasets.synthetic import register_synthetic
from avdet2.data.datasets.vggsound import register_vggsound
from avdet2.data.datasets.vggss import register_vggss

# The root is Detectron2's; nothing is read before a data set is used.
register_synthetic(default_root("synthetic_av"))
register_vggsound(default_root("vggsound"))
register_audioset(default_root("audioset"))
register_openimages(default_root("openimages"))
register_vggss(default_root("vggss"))
register_flickr(default_root("flickr_soundnet"))
register_music(default_root("music"))
register_music_clips(default_root("music"))
register_audioset_boxes(default_root("audioset_boxes"))
