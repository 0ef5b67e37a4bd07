"""The embedded demo: scenes of real handwritten digits, questions about them, and their judges."""

from lvrpo.info import require

require("einops", "numpy", "scikit-learn")

from lvrpo.digits.checks import DigitRules, check_samples
from lvrpo.digits.encoder import DualEncoder, train_dual_encoder
from lvrpo.digits.judge import digit_judge, gold_reader, read_pictures, reader_accuracy
from lvrpo.digits.phrases import scene_words
from lvrpo.digits.pictures import SPLITS, Split
from lvrpo.digits.scenes import SceneConfig, scene_examples, with_label_noise

__all__ = [
    "SPLITS",
    "DigitRules",
    "DualEncoder",
    "SceneConfig",
    "Split",
    "check_samples",
    "digit_judge",
    "gold_reader",
    "read_pictures",
    "reader_accuracy",
    "scene_examples",
    "scene_words",
    "train_dual_encoder",
    "with_label_noise",
]
