"""Classifiers from backbones: augmentation, fine-tuning, optimizers."""

from __future__ import annotations

from dlspark.models.augment import AUGMENTATIONS, check_augment
from dlspark.models.backbones import BACKBONES
from dlspark.models.classifier import build_classifier, check_backbone

__all__ = [
    "AUGMENTATIONS",
    "BACKBONES",
    "build_classifier",
    "check_augment",
    "check_backbone",
]
