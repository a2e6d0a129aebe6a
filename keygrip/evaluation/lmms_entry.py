"""The entry point `lmms_eval.models` of lmms-eval: the location of keygrip's adapter.

A separate module, because lmms-eval loads it while its own modules are being imported, perhaps by the adapter.
"""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Return keygrip's models by name; the adapter is imported only when it is used."""
    return ModelManifest(model_id="keygrip", simple_class_path="keygrip.evaluation.lmms.KeygripModel")
