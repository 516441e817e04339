# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Flickr-SoundNet's localisation test set (Senocak et al.): frames in which several people each drew
boxes around what sounds. One class, "sound source".
"""

import os
import xml.etree.ElementTree as ElementTree
from collections import Counter

from annotations.ground_truth import Box, GroundTruth, Picture, clean_corners
from annotations.prepare import read_csv

CLASS_NAME = "sound source"
# Boxes were drawn on frames of this many pixels a side.
SIDE = 256


def read_ids(path: str) -> list[str]:
    """
    The ids in flickr_test.csv: its first column, no header.

    Raises:
        ValueError: an id that is no number or is there twice.
    """
    ids = []
    for where, fields in read_csv(path, range(1, 10), "id, ..."):
        if not fields[0].isdigit():
            raise ValueError(f"{where}: expected the number of a Flickr video, found {fields[0]!r}")
        ids.append(fields[0])
    twice = [name for name, number in Counter(ids).items() if number > 1]
    if twice or not ids:
        raise ValueError(f"{path}: {'twice: ' + ', '.join(twice) if twice else 'no ids'}")
    return ids


def read_xml(path: str, dropped: Counter[str]) -> list[Box]:
    """
    The boxes of one frame.

    Args:
        path: of an XML file: below the root one node per annotator, in it `bbox` nodes of five
            children, of which the last four are xmin, ymin, xmax, ymax in pixels of 256 x 256.
        dropped: counts boxes that are left out.

    Returns:
        Boxes whose `extra` has "annotator": 0, 1, ... for each node that holds boxes.

    Raises:
        ValueError: no XML, or another format.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: no XML ({error})") from error
    people = [nodes for person in root if (nodes := person.findall("bbox"))]
    boxes = []
    for annotator, nodes in enumerate(people):
        for node in nodes:
            if len(node) != 5:
                raise ValueError(f"{path}: a bbox has {len(node)} children instead of 5")
            try:
                values = [float(child.text) / SIDE for child in list(node)[1:]]
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: a bbox holds no numbers ({error})") from error
            corners = clean_corners(path, values, dropped)
            if corners:
                boxes.append(Box(0, corners, {"annotator": annotator}))
    return boxes


def read_flickr(ids: list[str], folder: str) -> tuple[GroundTruth, dict[str, str]]:
    """
    Read the XML files of some frames.

    Args:
        ids: from :func:`read_ids`.
        folder: of the files `<id>.xml`.

    Returns:
        tuple: the boxes, and the reasons of ids without a file or without a box.
    """
    dropped: Counter[str] = Counter()
    pictures, missing = [], {}
    for name in ids:
        path = os.path.join(folder, f"{name}.xml")
        if not os.path.isfile(path):
            missing[name] = "no XML file"
            boxes = []
        elif not (boxes := read_xml(path, dropped)):
            missing[name] = "no box in the XML file"
        pictures.append(Picture(name, f"frames/{name}.jpg", boxes, (name, 0)))
    return GroundTruth([CLASS_NAME], pictures, dropped), missing
