"""SmolLM2-135M with three LoRA experts, served with its page; docs/serving.md tells how, the Makefile does it."""
