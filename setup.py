# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The metadata of avdet2. Versions that were tested together stand in requirements/.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "avdet2" / "__init__.py").read_text(encoding="utf-8"), re.M
).group(1)

# Detectron2 is required and not listed: no package index has a project of that name, so pip could
# not find it, or would take a stranger's. tools/install_detectron2.py installs it.
INSTALL_REQUIRES = [
    "torch>=2.4",
    "torchvision>=0.19",
    "torchaudio>=2.4",
    # 17.1 is the last one for Python 3.10. 19 has no metadata_errors, and its resamplers keep their
    # threads until they are garbage-collected.
    "av>=17.1,<19",
    "faster-coco-eval>=1.6.5",
    "filelock>=3.12",
    "fvcore>=0.1.5,<0.1.6",
    # Detectron2 does not work with newer ones.
    "iopath>=0.1.7,<0.1.10",
    "Jinja2>=3.1",
    "matplotlib>=3.7",
    "numpy>=1.24",
    # opencv-python does as well, but draws in the libraries of a desktop. 4.8 gives some self-boxes
    # other sides.
    "opencv-python-headless>=4.10",
    "Pillow>=9.5",
    # Before, a file of its own format could run code (CVE-2023-47248).
    "pyarrow>=14.0.1",
    "pycocotools>=2.0.6",
    "PyYAML>=6.0",
    "scikit-learn>=1.2",
    "scipy>=1.10",
    "tabulate>=0.9",
    "threadpoolctl>=3.1",
    "safetensors>=0.4",
    # All networks have ``forward_intermediates`` and ``prune_intermediate_layers``.
    "timm>=1.0.31",
    "tqdm>=4.60",
]
DEV = [
    "hypothesis>=6.100",
    "librosa>=0.10",
    "pytest>=7.4",
    "pytest-timeout>=2.2",
    "pytest-xdist>=3.5",
    # Another version may format otherwise.
    "ruff==0.17.6",
    # Tests of the page, where there is a Chromium.
    "selenium>=4.20",
    # Reads the labels that were exported.
    "supervision>=0.26.1",
]
# tools/export_labels.py and tools/export_model.py; PyTorch asks for onnx.
EXPORT = ["globox>=2.5", "onnx>=1.16", "onnxruntime>=1.18"]
# tools/predict.py --track. It asks for opencv-python, which lies beside the headless build in one
# Python package, cv2: install the headless one again after it.
TRACK = ["supervision>=0.26.1", "trackers>=2.6"]
# WANDB.PROJECT.
WANDB = ["wandb>=0.16"]
# datasets/download_clips.py, which also needs the program ffmpeg.
DOWNLOAD = ["yt-dlp>=2024.8"]

setup(
    name="avdet2",
    version=VERSION,
    description="Object detectors learned from unlabelled videos, with sound as the teacher",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    author="avdet2 authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["object detection", "self-supervised learning", "audio-visual", "Detectron2"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    packages=find_packages(include=["avdet2", "avdet2.*"]),
    package_data={
        # Through links, so that the checkout has one place for each: as in Detectron2, configs are
        # in the package's model zoo. The tools are the commands of `avdet2`.
        "avdet2": ["py.typed", "tools/*.py", "tools/detectron2_pure/*"],
        "avdet2.model_zoo": ["configs/**/*.yaml"],
        "avdet2.data.datasets": ["*.json"],
        "avdet2.report": ["templates/*"],
    },
    entry_points={"console_scripts": ["avdet2 = avdet2.__main__:main"]},
    python_requires=">=3.10,<3.13",
    install_requires=INSTALL_REQUIRES,
    extras_require={
        # MODEL.META_ARCHITECTURE SelectiveSearch. Uninstall the other packages of OpenCV first: all
        # of them are one Python package, cv2.
        "selective-search": ["opencv-contrib-python-headless>=4.10"],
        "export": EXPORT,
        "track": TRACK,
        "wandb": WANDB,
        "download": DOWNLOAD,
        # Tests, lint and format.
        "dev": DEV + EXPORT + DOWNLOAD,
    },
)
