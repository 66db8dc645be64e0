"""sparktune: fused ops, model patches, 4-bit loading and export for fine-tuning on a DGX Spark."""
