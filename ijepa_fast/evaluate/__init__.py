"""What frozen features are worth: k-NN, linear probe, feature rank, and baselines without a network."""

from ijepa_fast.evaluate.features import (
    collect_features,
    colour_histogram,
    extract_features,
    pixel_features,
    pool_features,
)
from ijepa_fast.evaluate.health import HealthBuffer, feature_health, feature_std, rank_me
from ijepa_fast.evaluate.knn import OnlineKNN, knn_accuracy, knn_predict
from ijepa_fast.evaluate.probe import ProbeResult, ProbeSetting, best_linear_probe, linear_probe

__all__ = [
    "HealthBuffer",
    "OnlineKNN",
    "ProbeResult",
    "ProbeSetting",
    "best_linear_probe",
    "collect_features",
    "colour_histogram",
    "extract_features",
    "feature_health",
    "feature_std",
    "knn_accuracy",
    "knn_predict",
    "linear_probe",
    "pixel_features",
    "pool_features",
    "rank_me",
]
