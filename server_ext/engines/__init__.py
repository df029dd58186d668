"""The engines that hold the frozen model: vLLM, and plain PyTorch + Transformers as the reference."""
