#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Write the weights in a TensorFlow checkpoint to an .npz file, for tools/convert_simclr_to_d2.py.

    python dump_tf_checkpoint.py ResNet50_1x/ weights.npz
    python dump_tf_checkpoint.py ResNet50_1x/model.ckpt-225206 weights.npz

It needs TensorFlow (1.15 or 2) and NumPy, and nothing else: copy this one file to where they are.
"""

import argparse
import os
import sys

import numpy as np

# An optimizer's variables, which nobody needs.
SLOTS = ("/Momentum", "/Adam", "/Adam_1", "/LARSOptimizer")


def find_prefix(path):
    """
    The path without .index of the one checkpoint that ``path``, a folder or a prefix, stands for.
    """
    if not os.path.isdir(path):
        prefix = path[: -len(".index")] if path.endswith(".index") else path
        if not os.path.isfile(prefix + ".index"):
            raise ValueError(f"{path} is neither a folder nor a checkpoint: no {prefix}.index")
        return prefix
    found = []
    for folder, _, names in os.walk(path):
        names = [name[: -len(".index")] for name in names if name.endswith(".index")]
        found += [os.path.join(folder, name) for name in names]
    # SimCLR's zips also hold a TF-Hub module made from the checkpoint.
    modules = [name for name in found if name.endswith(os.path.join("variables", "variables"))]
    found = sorted(name for name in found if name not in modules) or modules
    if not found:
        raise ValueError(f"{path} holds no checkpoint (*.index)")
    if len(found) > 1:
        raise ValueError(f"{path} holds several checkpoints, give one of {', '.join(found)}")
    return found[0]


def main():
    """
    See the top of this file.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, or path without .index")
    parser.add_argument("output", metavar="OUT.npz", help="file to write")
    args = parser.parse_args()
    try:
        if not args.output.endswith(".npz"):
            raise ValueError(f"{args.output} must end in .npz")
        prefix = find_prefix(args.checkpoint)
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        import tensorflow as tf
    except ImportError:
        sys.exit("error: TensorFlow is not installed here (pip install tensorflow-cpu)")

    reader = tf.train.load_checkpoint(prefix)
    types = reader.get_variable_to_dtype_map()
    names = sorted(
        name
        for name, kind in types.items()
        if kind.is_floating and not name.endswith(SLOTS) and ".OPTIMIZER_SLOT" not in name
    )
    try:
        np.savez(args.output, **{name: reader.get_tensor(name) for name in names})
    except OSError as error:
        sys.exit(f"error: {error}")
    print(f"{args.output}: {len(names)} of {len(types)} variables of {prefix}")


if __name__ == "__main__":
    main()
