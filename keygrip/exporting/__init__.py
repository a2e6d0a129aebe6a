"""Trained models in the formats that other programs read: safetensors folders, torch.export, ONNX."""
