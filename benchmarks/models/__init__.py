"""The models that are measured, and PWEMoE's own."""
