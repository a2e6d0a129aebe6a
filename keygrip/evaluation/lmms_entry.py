"""What lmms-eval's entry point `lmms_eval.models` gives: where keygrip's adapter is.

By itself, since lmms-eval loads it while its own modules are being imported, perhaps by the adapter.
"""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """keygrip's models, by name; the adapter is imported where one is asked for."""
    return ModelManifest(model_id="keygrip", simple_class_path="keygrip.evaluation.lmms.KeygripModel")
