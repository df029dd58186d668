"""What serving on an NVIDIA GPU adds: kernels that draw noise into slots and apply it, and how vLLM finds them."""
