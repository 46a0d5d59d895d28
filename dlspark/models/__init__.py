"""Classifiers from backbones: options, augmentation, fine-tuning, optimizers."""

from __future__ import annotations

from dlspark.models.augment import AUGMENTATIONS, check_augment
from dlspark.models.backbones import BACKBONES, Backbone, check_backbone
from dlspark.models.classifier import build_classifier, build_from_options
from dlspark.models.options import ClassifierOptions, option_schemas

__all__ = [
    "AUGMENTATIONS",
    "BACKBONES",
    "Backbone",
    "ClassifierOptions",
    "build_classifier",
    "build_from_options",
    "check_augment",
    "check_backbone",
    "option_schemas",
]
