#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Prints the size and cost of models: parameters, activations and flops of one sample.

    python tools/analyze_model.py                                            of all configs
    python tools/analyze_model.py --config-file configs/AV-Localization/pretrain.yaml --depth 2
    python tools/analyze_model.py --config-file ... MODEL.RESNETS.DEPTH 18

A sample is a square frame with its sound for a localizer, two views for SimCLR (of which only the
encoder is counted), a picture of 3 x 4 at the size of the test for a detector. A flop is a product
with its sum, as fvcore counts; what it does not know (sums, sorting, NMS) is left out.
"""

import argparse
import logging
from pathlib import Path

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(files=["--config-file"])

import torch
from fvcore.nn import (
    ActivationCountAnalysis,
    FlopCountAnalysis,
    flop_count_table,
    parameter_count,
)
from tabulate import tabulate
from torch import nn

from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model

from avdet2 import load_cfg, model_zoo
from avdet2.utils.tool import run_tool

# Without a network, or not run without weights.
NOT_COUNTED = {"CenterBox", "ClassAgnosticRPN", "FullFrame", "SelectiveSearch"}
MILLION = 1e6
HEADERS = ["config", "model", "parameters (M)", "activations (M)", "flops (G)"]


def sample_of(cfg: CfgNode) -> list[dict]:
    """
    What the model of a config takes.
    """
    height, width = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST * 4 // 3
    waveform = {}
    if cfg.MODEL.META_ARCHITECTURE == "AVLocalizer":
        node = cfg.INPUT.AV
        height = width = node.CROP_SIZE
        sound = torch.zeros(round(node.AUDIO_SECONDS * node.SAMPLE_RATE), dtype=torch.int16)
        waveform = {"waveform": sound}
    return [{"image": torch.zeros(3, height, width, dtype=torch.uint8), **waveform}]


def network(cfg: CfgNode) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """
    The network of a config on the CPU, and what it takes.
    """
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if cfg.MODEL.META_ARCHITECTURE == "SimCLR":
        return model.backbone["bottom_up"], (torch.zeros(2, 3, *2 * (cfg.INPUT.VIEWS.SIZE,)),)
    whole = TracingAdapter(model, sample_of(cfg), allow_non_tensor=True).eval()
    return whole, whole.flattened_inputs


def measure(cfg: CfgNode) -> tuple[FlopCountAnalysis, ActivationCountAnalysis]:
    """
    fvcore's counts for the network of a config.
    """
    counts = [analysis(*network(cfg)) for analysis in (FlopCountAnalysis, ActivationCountAnalysis)]
    for count in counts:
        count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        count.tracer_warnings("none")
    return tuple(counts)


def row(name: str, cfg: CfgNode) -> list:
    """
    A config in the table.
    """
    flops, activations = measure(cfg)
    with torch.no_grad():
        found = parameter_count(flops._model)[""], activations.total(), flops.total()
    kind = cfg.MODEL.META_ARCHITECTURE
    return [name, kind, found[0] / MILLION, found[1] / MILLION, found[2] / 1000 / MILLION]


def all_configs() -> list[tuple[str, CfgNode]]:
    """
    The stages among the configs that come with avdet2.
    """
    root = Path(model_zoo.get_config_file("Base-AVLocalizer.yaml")).parent
    names = sorted(str(path.relative_to(root)) for path in root.glob("*/*.yaml"))
    found = [(name, model_zoo.get_config(name)) for name in names]
    return [(name, cfg) for name, cfg in found if not cfg.PIPELINE.STAGES]


def main(args: argparse.Namespace) -> None:
    """
    Print the table of all configs, or of the modules of one.
    """
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    if args.config_file:
        configs = [(args.config_file, load_cfg(args.config_file, args.opts))]
    else:
        configs = all_configs()
    rows = []
    for name, cfg in configs:
        cfg.MODEL.DEVICE = "cpu"
        if cfg.MODEL.META_ARCHITECTURE not in NOT_COUNTED:
            rows.append(row(name, cfg))
    print(tabulate(rows, HEADERS, tablefmt="github", floatfmt=".2f"))
    if args.config_file and rows and args.depth:
        flops, activations = measure(configs[0][1])
        with torch.no_grad():
            print(f"\n{flop_count_table(flops, args.depth, activations)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", help="(default: all that come with avdet2)")
    parser.add_argument("--depth", type=int, default=0, help="also show modules, so deep")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, with --config-file"
    )
    run_tool(main, parser.parse_args())
