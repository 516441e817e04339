# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
from avdet2.evaluation.baselines import CenterBox  # noqa: F401
from avdet2.evaluation.build import build_evaluator  # noqa: F401
from avdet2.evaluation.cluster_matching import ClusterMatching, match_clusters  # noqa: F401
from avdet2.evaluation.detection import SelfSupervisedDetectionEvaluator  # noqa: F401
from avdet2.evaluation.localization_evaluator import LocalizationEvaluator  # noqa: F401
