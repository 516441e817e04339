# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Fixtures of the tests of training.
"""

import pytest

from detectron2.data import DatasetCatalog

from avdet2.data.datasets.synthetic import register_synthetic


@pytest.fixture(scope="module")
def tiny_av(tiny_datasets):
    if "tiny_av_train" not in DatasetCatalog.list():
        register_synthetic(str(tiny_datasets / "synthetic_av"), prefix="tiny_av")
    return "tiny_av"
