"""Export trained models to the formats of other programs: safetensors folders, torch.export, ONNX."""
