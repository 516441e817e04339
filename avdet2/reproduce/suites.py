# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Which of our runs stands beside each row of the paper's tables.

A suite is one data set's analogue of all tables: "vggsound" are the paper's experiments,
"synthetic" the same on the synthetic benchmark, which a CPU can run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from avdet2.data.datasets.label_maps import general_labels, test_classes
from avdet2.reproduce.paper import PAPER_TABLES

__all__ = ["SUITES", "Column", "Source", "Suite", "SuiteFigure", "SuiteTable"]


@dataclass(frozen=True)
class Column:
    """
    A column of our numbers.

    Attributes:
        name: heading.
        metric: key in the results; "{}" stands for the row's class.
        test_set: whose results are read.
        task: of the results. "bbox" is "bbox_agnostic" for a class-agnostic row.
        agnostic: key for a class-agnostic row, where it is another one.
        is_silent: its images have no sound.
        trained_on: prefix of the stages that were trained for this column.
    """

    name: str
    metric: str
    test_set: str
    task: str = "bbox"
    trained_on: str = ""
    agnostic: str = ""
    is_silent: bool = False


@dataclass(frozen=True)
class Source:
    """
    Where a row's numbers come from: a stage of the suite's pipeline, evaluated with options.

    Attributes:
        stage: of the pipeline.
        opts: KEY VALUE pairs of the evaluation.
        agnostic: classes do not count.
        label: class of the row, for columns with "{}"; "" for their mean.
        name: of the row where it is not the paper's, for instance its analogue's beta.
        is_trained: False for baselines, which are the same whatever others are trained on.
        needs_sound: it has no number for images without sound.
        dictionary: the evaluation needs the localizer's dictionary of objects.
        taught: a detector; boxes are made as those that it learned from.
        needs: a module that the stage needs and that may not be installed.
    """

    stage: str
    opts: tuple[str, ...] = ()
    agnostic: bool = False
    label: str = ""
    name: str = ""
    is_trained: bool = True
    needs_sound: bool = False
    dictionary: bool = False
    taught: str = ""
    needs: str = ""


@dataclass(frozen=True)
class SuiteTable:
    """
    Our side of one table: its columns, and a source by row. Rows that the paper does not have come
    behind those that it has; a row without a source is quoted only. The note says what else a
    reader of our numbers has to know.
    """

    columns: tuple[Column, ...]
    sources: dict[str, Source]
    note: str = ""


@dataclass(frozen=True)
class SuiteFigure:
    """
    Our side of a figure: test images, with what the detector of a table's row finds on them.

    Attributes:
        title: what it shows.
        table, row, column: whose detections, on which test set.
        count: images; of failures, images of each kind.
        skip: images that another figure shows.
        objects: least number of detections in an image.
        beside: a row whose detections stand beside them, where the suite can run it.
        is_failures: it shows failures, by kind, in place of the surest detections.
    """

    title: str
    table: int
    row: str
    column: str
    count: int = 12
    skip: int = 0
    objects: int = 1
    beside: str = ""
    is_failures: bool = False


@dataclass(frozen=True)
class Suite:
    """
    Attributes:
        config: the pipeline with all stages, relative to configs/.
        tables: by number.
        figures: by number.
    """

    config: str
    tables: dict[int, SuiteTable]
    figures: dict[str, SuiteFigure]


# Columns of Table 1.
AP = ("AP30", "AP50", "AP")
CENTER_BOX = Source("center_box", agnostic=True, is_trained=False)


def _matching(**values: object) -> tuple[str, ...]:
    """
    KEY VALUE pairs below TEST.MATCHING.
    """
    return tuple(
        word for key, value in values.items() for word in (f"TEST.MATCHING.{key}", str(value))
    )


def _table1(columns: tuple[Column, ...], **others: Source) -> SuiteTable:
    sources = {
        # A known label stands for its class; there is nothing to match one to one.
        "Ours - weak sup.": Source("detector_weak", _matching(SPACE="mappable")),
        "Center Box*": CENTER_BOX,
        "Selective Search*": replace(CENTER_BOX, stage="selective_search", needs="cv2.ximgproc"),
        "Ours - self-boxes*": Source(
            "localizer_joint", agnostic=True, needs_sound=True, taught="detector"
        ),
        "Ours - full": Source("detector"),
    }
    return SuiteTable(columns, sources | others)


# Of Table 2.
AGNOSTIC_NOTE = (
    "In the column multi, rows of methods without classes (Objects that Sound, Attention, DMC, "
    "Center Box) count all that is above 0.0001 of the map's maximum, as DSOL's code does: a map "
    "that is nowhere near zero is the whole frame."
)


def _table2(single: str, multi: str, ours: str, note: str = "") -> SuiteTable:
    opts = ("TEST.LOCALIZATION.PROTOCOLS", "('single', 'multi')")

    def column(name: str, metric: str, test_set: str, agnostic: str = "") -> Column:
        return Column(name, metric, test_set, "localization", ours, agnostic)

    columns = (
        column("single IoU-0.5", "single_IoU50", single),
        column("single AUC", "single_AUC", single),
        column("multi cIoU-0.3", "multi_cIoU30", multi, "multi_agnostic_cIoU30"),
    )
    sources = {
        "Objects that Sound": Source("objects_that_sound", opts, agnostic=True),
        "Attention": Source("attention", opts, agnostic=True),
        "DMC": Source("dmc", opts, agnostic=True),
        "DSOL": Source("localizer_joint", opts, dictionary=True),
        "Ours": Source("detector", opts),
        "Attention, with Senocak et al.'s loss": Source("attention_senocak", opts, agnostic=True),
        "Attention, with the loss of eq. 1": Source("attention_nce", opts, agnostic=True),
        "Ours - heatmaps": Source("localizer_joint", opts),
        "Center Box, 0.8 x 0.8": replace(CENTER_BOX, stage="center_box_80", opts=opts),
    }
    return SuiteTable(columns, sources, f"{AGNOSTIC_NOTE} {note}".strip())


def _per_class(columns: tuple[Column, ...], stage: str, names: Sequence[str], *opts: str):
    sources = {name: Source(stage, opts, label=name) for name in names}
    return SuiteTable(columns, {"mean": Source(stage, opts), **sources})


def _table4(
    columns: tuple[Column, ...], stages: Sequence[str], betas: Sequence[str] = ()
) -> SuiteTable:
    rows = tuple(PAPER_TABLES[4].rows)
    names = [f"{row} (here {beta})" for row, beta in zip(rows, betas)] or [""] * len(rows)
    sources = {row: Source(stage, name=name) for row, stage, name in zip(rows, stages, names)}
    return SuiteTable(columns, sources)


def _table5(columns: tuple[Column, ...], numbers: Sequence[int], standard: int) -> SuiteTable:
    sources = {}
    for row, number in zip(PAPER_TABLES[5].rows, numbers):
        name = "" if row == f"K = {number}" else f"{row} (here {number})"
        stage = "detector" if number == standard else f"detector_K{number}"
        sources[row] = Source(stage, name=name)
    return SuiteTable(columns, sources)


def _table6(columns: tuple[Column, ...], *opts: str) -> SuiteTable:
    rows = {
        "Hungarian": _matching(METHOD="hungarian"),
        "Argmax": _matching(METHOD="argmax"),
        "Manual": _matching(METHOD="manual", SPACE="mappable"),
        "1-shot": _matching(METHOD="mshot", M=1),
        "10-shot": _matching(METHOD="mshot", M=10),
    }
    return SuiteTable(
        columns, {row: Source("detector", (*opts, *values)) for row, values in rows.items()}
    )


def _figures(column: str, general: str) -> dict[str, SuiteFigure]:
    ours = {"table": 1, "row": "Ours - full", "column": column}
    objects = {"table": 7, "row": "mean", "column": general}
    return {
        "1": SuiteFigure("Learned by watching videos", **ours),
        "3": SuiteFigure(
            "Several objects, and a weakly supervised detector",
            **ours,
            objects=2,
            beside="PCL (WSOD)",
        ),
        "4": SuiteFigure("Beyond musical instruments", **objects, count=8),
        "A.1": SuiteFigure("More objects beyond musical instruments", **objects, skip=8, count=16),
        "A.2": SuiteFigure("Failure cases", **ours, count=4, is_failures=True),
    }


def _vggsound() -> Suite:
    vggsound = "vggsound_test_boxes"
    audioset = "audioset_instruments_test"
    openimages = "openimages_instruments_test"
    sets = (
        ("VGGSound", vggsound, ""),
        ("AudioSet", audioset, "audioset_"),
        ("OpenImages", openimages, ""),
    )
    wide = tuple(
        Column(f"{name} {ap}", ap, test, trained_on=prefix, is_silent=test == openimages)
        for name, test, prefix in sets
        for ap in AP
    )
    ap50 = (
        Column("VGGSound AP50", "AP50", vggsound),
        Column("OpenImages AP50", "AP50", openimages),
    )
    classes = (
        Column("OpenImages", "AP50{}", openimages),
        Column("AudioSet", "AP50{}", audioset, trained_on="audioset_"),
        Column("VGGSound", "AP50{}", vggsound),
    )
    general = tuple(Column(ap, ap + "{}", "openimages_general10_test") for ap in AP)
    coco_rpn = replace(CENTER_BOX, stage="coco_rpn")
    # All classes of the mean, also the one that has no row in the paper.
    names_3 = [name for name in PAPER_TABLES[3].rows if name != "mean"]
    names_3 += [name for name in test_classes() if name not in names_3]
    names_7 = list(general_labels(in_table_7=True).values())
    return Suite(
        "Paper-Tables/vggsound.yaml",
        {
            1: _table1(wide, **{"COCO-trained RPN*": coco_rpn}),
            2: _table2(
                "audioset_instruments_solo_test",
                "audioset_instruments_multi_test",
                "audioset_solo_",
            ),
            3: _per_class(classes, "detector", names_3),
            # 39.4 and 28.5, the paper's main result, is of beta .7: so is the stage "detector".
            4: _table4(
                ap50,
                (
                    "detector",
                    "detector_beta_middle",
                    "detector_beta_high",
                    "detector_beta_range",
                    "detector_beta_range_multi",
                ),
            ),
            5: _table5(ap50, (20, 30, 39, 50), 39),
            6: _table6(ap50),
            7: _per_class(general, "detector_K300", names_7, *_matching(SPACE="all")),
        },
        _figures("OpenImages AP50", "AP50"),
    )


def _synthetic() -> Suite:
    from avdet2.data.datasets.synthetic import class_names

    test = "synthetic_av_test"
    three = tuple(Column(ap, ap, test) for ap in AP)
    ap50 = (Column("AP50", "AP50", test),)
    grouped = (Column("AP50, grouped classes", "AP50", "synthetic_av_test_groups"),)
    names = list(class_names(6))
    return Suite(
        "Paper-Tables/synthetic.yaml",
        {
            1: _table1(three),
            2: _table2(
                f"{test}_single",
                f"{test}_multi",
                "",
                "Frames with one object, and frames with several, all of which are asked for: as "
                "only one of them sounds, heatmaps can find but one.",
            ),
            3: _per_class((Column("AP50", "AP50{}", test),), "detector", names),
            4: _table4(
                ap50,
                (
                    "detector_beta_low",
                    "detector_beta_middle",
                    "detector_beta_high",
                    "detector",
                    "detector_beta_range_multi",
                ),
                ("0.2", "0.35", "0.5", "0.2-0.5", "0.2-0.5"),
            ),
            5: _table5(ap50, (3, 5, 6, 8), 6),
            6: replace(
                _table6(grouped),
                note="The test classes are groups of the training labels: shape (ring, star, "
                "cross), strings (guitar, harp), keys (keyboard). One label represents each group.",
            ),
            7: _per_class(
                tuple(Column(ap, ap + "{}", test) for ap in AP),
                "detector_K12",
                names,
                *_matching(SPACE="all"),
            ),
        },
        _figures("AP50", "AP50"),
    )


SUITES = {"synthetic": _synthetic(), "vggsound": _vggsound()}
