# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
from avdet2.evaluation.baselines import CenterBox  # noqa: F401
from avdet2.evaluation.build import build_evaluator  # noqa: F401
from avdet2.evaluation.detection.evaluator import SelfSupervisedDetectionEvaluator  # noqa: F401
from avdet2.evaluation.localization.evaluator import LocalizationEvaluator  # noqa: F401
from avdet2.evaluation.naming.cluster_matching import ClusterMatching, match_clusters  # noqa: F401
from avdet2.evaluation.naming.cluster_names import ClusterNames  # noqa: F401
