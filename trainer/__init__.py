"""The record: data, model, training, quantization, artifact, evaluation."""
