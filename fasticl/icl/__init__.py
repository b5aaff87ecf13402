"""The in-context learning theory's model: its data, training, evaluation and pruning.

``data = ICLData(); model = ICLTransformer(); train(model, data); pruning_curve(model, data)``
"""

from fasticl.icl.data import ICLData, Patterns, Prompts
from fasticl.icl.model import FusedICLTransformer, ICLTransformer
from fasticl.icl.train import Evaluation, PruningPoint, evaluate, hinge_loss, pruning_curve, train

__all__ = [
    "Evaluation",
    "FusedICLTransformer",
    "ICLData",
    "ICLTransformer",
    "Patterns",
    "Prompts",
    "PruningPoint",
    "evaluate",
    "hinge_loss",
    "pruning_curve",
    "train",
]
