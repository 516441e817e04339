# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Data sets that exist by name as soon as avdet2 is imported: those of the paper, and the synthetic
benchmark. Nothing is read before a data set is used; datasets/README.md says how each is made.
"""

import os

from avdet2.data.datasets.clip_lists import register_clip_lists
from avdet2.data.datasets.coco_av import register_test_set
from avdet2.data.datasets.label_maps import openimages_groups, test_classes
from avdet2.data.datasets.synthetic import register_synthetic

# Training sets: the folder, the script that prepares it, and the list of each data set.
CLIP_LISTS = {
    "vggsound": (
        "prepare_vggsound.py --csv vggsound.csv",
        {
            "vggsound_train": "train",
            "vggsound_instruments_train": "instruments_train",
            "vggsound_mappable_train": "mappable_train",
        },
    ),
    "audioset": (
        "prepare_audioset.py --segments <csv files>",
        {
            "audioset_instruments_train": "instruments_train",
            "audioset_instruments_13_train": "instruments_13_train",
            "audioset_instruments_13_solo_train": "instruments_13_solo_train",
        },
    ),
    "music": (
        "prepare_music_clips.py",
        {"music_solo_train": "solo_train", "music_duet_train": "duet_train"},
    ),
}


def default_root(name: str) -> str:
    """
    The folder of a data set below $DETECTRON2_DATASETS (default: ./datasets), which may begin with
    "~".
    """
    return os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), name)


def _register_test_sets(folder: str, script: str, *names: str, classes=None, extra=()) -> None:
    for name in names:
        register_test_set(default_root(folder), name, script, classes, extra)


register_synthetic(default_root("synthetic_av"))
for _folder, (_command, _lists) in CLIP_LISTS.items():
    register_clip_lists(default_root(_folder), _lists, f"`python datasets/{_command}`")
for _group, _classes in openimages_groups().items():
    _names = [f"openimages_{_group}_{split}" for split in ("test", "validation", "train")]
    _register_test_sets("openimages", "prepare_openimages.py", *_names, classes=_classes)
_register_test_sets("vggss", "prepare_vggss.py", "vggss_test")
_register_test_sets(
    "vggss",
    "prepare_vggss.py",
    "vggsound_test_boxes",
    "vggsound_test_boxes_representative",
    classes=test_classes(),
)
# What several people agree on is what counts in its protocol.
_register_test_sets(
    "flickr_soundnet",
    "prepare_flickr_soundnet.py",
    "flickr_soundnet_test",
    classes=["sound source"],
    extra=["annotator"],
)
_register_test_sets(
    "music", "prepare_music.py", "music_solo_test", "music_duet_test", classes=test_classes()
)
_register_test_sets(
    "audioset_boxes",
    "prepare_audioset_boxes.py",
    "audioset_instruments_test",
    "audioset_instruments_solo_test",
    "audioset_instruments_multi_test",
    classes=test_classes(),
)
