# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Generator of the synthetic audio-visual benchmark: objects on cluttered backgrounds, class-specific
sounds, exact truth. `datasets/prepare_synthetic.py` is its command line.
"""
