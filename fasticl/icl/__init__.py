"""The in-context learning theory's model: its data, training, evaluation and pruning.

``data = ICLData(); model = ICLTransformer(); train(model, data); pruning_curve(model, data)``
"""

from fasticl.icl.baselines import BASELINES, baseline_errors
from fasticl.icl.data import ICLData, Patterns, Prompts
from fasticl.icl.gpt2 import ICLGPT2
from fasticl.icl.measure import (
    PRUNING_ORDERS,
    Clusters,
    Projections,
    RowGeometry,
    attention_by_layer,
    clusters,
    projections,
    pruning_order,
    row_geometry,
)
from fasticl.icl.model import FusedICLTransformer, ICLTransformer
from fasticl.icl.train import Evaluation, PruningPoint, Training, evaluate, hinge_loss, pruning_curve, train

__all__ = [
    "BASELINES",
    "ICLGPT2",
    "PRUNING_ORDERS",
    "Clusters",
    "Evaluation",
    "FusedICLTransformer",
    "ICLData",
    "ICLTransformer",
    "Patterns",
    "Projections",
    "Prompts",
    "PruningPoint",
    "RowGeometry",
    "Training",
    "attention_by_layer",
    "baseline_errors",
    "clusters",
    "evaluate",
    "hinge_loss",
    "projections",
    "pruning_curve",
    "pruning_order",
    "row_geometry",
    "train",
]
